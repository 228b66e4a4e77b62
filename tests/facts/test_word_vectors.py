import gzip
import os
import random
import signal
import struct

import pytest
import torch

from mas_embed import UserError
from mas_embed.facts import read_word_vectors
from mas_embed.facts.word_vectors import phrase_vectors

VECTORS = {"black": [3.0, 4.0], "New York": [0.5, -2.0], "größe": [1e-3, 7.0]}


def text(vectors, header):
    lines = [f"{len(vectors)} 2"] if header else []
    return "\n".join([*lines, *(f"{word} {a} {b}" for word, (a, b) in vectors.items()), ""]).encode()


def binary(vectors, separator):
    rows = [word.encode() + b" " + struct.pack("<2f", *numbers) + separator for word, numbers in vectors.items()]
    return f"{len(vectors)} 2\n".encode() + b"".join(rows)


def as_lists(vectors):
    return {word: pytest.approx(vector.tolist()) for word, vector in vectors.items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "content",
    [text(VECTORS, header=True), text(VECTORS, header=False)],
    ids=["word2vec text", "GloVe"],
)
def test_text_with_and_without_a_header(tmp_path, content, packed):
    path = tmp_path / ("vectors.txt.gz" if packed else "vectors.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    # GloVe has no header: a space in the first word would count as one more number, so that word has none
    assert as_lists(read_word_vectors(path)) == VECTORS
    assert as_lists(read_word_vectors(path, {"größe", "absent"})) == {"größe": VECTORS["größe"]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("separator", [b"", b"\n"])
def test_binary_with_and_without_line_feeds(tmp_path, separator, packed):
    vectors = {word.replace(" ", "_"): numbers for word, numbers in VECTORS.items()}
    content = binary(vectors, separator)
    path = tmp_path / ("vectors.bin.gz" if packed else "vectors")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert as_lists(read_word_vectors(path)) == vectors
    assert list(read_word_vectors(path, ["New_York"])) == ["New_York"]


def test_binary_numbers_that_look_like_line_feeds(tmp_path):
    number = struct.unpack("<f", b"\n\n\n\n")[0]
    path = tmp_path / "vectors.bin"
    path.write_bytes(binary({"a": [number, 1.0], "b": [2.0, number]}, b"\n"))
    assert as_lists(read_word_vectors(path)) == {"a": [number, 1.0], "b": [2.0, number]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1 2\nb 1\n", "line 2 of .* must hold a word and 2 numbers, got 2 fields"),
        (b"a 1 2\nb 1 x\n", "line 2 of .* must end with 2 numbers"),
        (b"1 2\na 1 nan\n", "line 2 of .* not finite"),
        (b"", "holds no word vectors"),
        (binary(VECTORS, b"")[:-3], "ends after 2 of its 3 words"),
        (binary({"a": [float("inf"), 0.0]}, b""), "the vector of 'a' .* not finite"),
        (b"2 3\na 1 2\nb 1 2\n", "line 2 of .* must hold a word and 3 numbers, got 3 fields"),
        (b"2 1\na 1 2\nb 1 2\n", "line 2 of .* must hold a word and 1 numbers, got 3 fields"),
        (b"2 2\na 1 x\nb 1 2\n", "line 2 of .* must end with 2 numbers"),
        (b"a 1 2\ncat 1 2 3\n", "line 2 of .* must hold a word and 2 numbers, got 4 fields"),
        (b"a,1,2\n", "line 1 of .* must hold a word and 0 numbers"),
        (b"3 2\na 1 2\nb 1 2\n", "ends after 2 of its 3 words"),
        (b"2 0\na\nb\n", "begins with vectors of size 0"),
        (b"3 999999999999\na \0\0\0\0", "is too short for 3 vectors of size 999999999999"),
        (b"999999999999 1\na \0\0\0\0", "is too short for 999999999999 vectors of size 1"),
    ],
)
def test_files_that_are_damaged(tmp_path, content, message):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_word_vectors(path)


def test_words_may_contain_spaces_and_be_numbers(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"7 1 2\n. . . 3 4\nat 5 pm 5 6\nnan 7 8\n")
    assert list(read_word_vectors(path)) == ["7", ". . .", "at 5 pm", "nan"]


@pytest.mark.parametrize("header", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path, header):
    path = tmp_path / "vectors.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text(VECTORS, header))
    assert as_lists(read_word_vectors(path)) == VECTORS


@pytest.mark.parametrize("word", ["größe", "\0"])
def test_a_file_of_strange_words_is_no_binary_file(tmp_path, word):
    path = tmp_path / "vectors.txt"
    path.write_bytes(f"2 2\n{word} 1 2\ncat 3 4\n".encode("latin-1"))
    assert read_word_vectors(path)["cat"].tolist() == [3, 4]


def test_a_packed_file_that_promises_too_much_takes_no_memory(tmp_path):
    path = tmp_path / "vectors.gz"
    path.write_bytes(gzip.compress(b"1 99999999999999\na \0\0\0\0"))
    with pytest.raises(UserError, match="too short for 1 vectors of size 99999999999999"):
        read_word_vectors(path)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the word vectors .*nothing.txt: No such file"):
        read_word_vectors(tmp_path / "nothing.txt")
    (tmp_path / "plain.gz").write_bytes(b"a 1 2\n")
    with pytest.raises(UserError, match=r"cannot read the word vectors .*plain.gz: Not a gzipped file"):
        read_word_vectors(tmp_path / "plain.gz")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"a 1 2\n" * 1000)[:-20])
    with pytest.raises(UserError, match=r"cannot read the word vectors .*torn.gz"):
        read_word_vectors(tmp_path / "torn.gz")


def test_a_phrase_is_the_mean_of_unit_vectors():
    vectors = {"black": torch.tensor([3.0, 4.0]), "circle": torch.tensor([0.0, 2.0])}
    phrases = phrase_vectors(["black_circle", "black  circle", "Black"], vectors)
    # (0.6, 0.8) and (0, 1)
    assert phrases["black_circle"].tolist() == pytest.approx([0.3, 0.9])
    assert torch.equal(phrases["black  circle"], phrases["black_circle"])
    assert phrases["Black"].tolist() == pytest.approx([0.6, 0.8])


def test_every_word_without_a_vector_is_listed():
    vectors = {"black": torch.tensor([1.0]), "null": torch.tensor([0.0])}
    with pytest.raises(UserError, match="^3 words have no vector: circle, null, riding; add their vectors, or"):
        phrase_vectors(["black circle", "riding", "null", "riding"], vectors)


def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path):
    random_bytes, path, messages = random.Random(0), tmp_path / "vectors.gz", []
    hostile = [b"\0", b"1e999", b"9" * 5000, b"nan", b"\xff\xfe", b"\xef\xbb\xbf", b"x" * 70_000, b"\n", b" ", b"-1"]
    for content in (
        text(VECTORS, header=True),
        text(VECTORS, header=False),
        binary({"a": [1.0, 2.0], "b": [3.0, 4.0]}, b"\n"),
    ):
        for number in range(120):
            start = random_bytes.randrange(len(content))
            end = random_bytes.choice([start, start + 1, len(content)])
            torn = content[:start] + random_bytes.choice([*hostile, b""]) + content[end:]
            packed = gzip.compress(torn)
            path.write_bytes(packed[: random_bytes.randrange(len(packed))] if number % 10 == 0 else packed)
            try:
                assert all(vector.isfinite().all() for vector in read_word_vectors(path).values())
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message and len(message) < 500 for message in messages)


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.gz"])
def test_a_pipe_is_never_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    signal.alarm(20)
    with pytest.raises(UserError, match=f"cannot read the word vectors .*{name}: it is a pipe, a socket or a device"):
        read_word_vectors(tmp_path / name)
    with pytest.raises(UserError, match="cannot read the word vectors .*: it is a folder, not a file"):
        read_word_vectors(tmp_path)
    signal.alarm(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 50_000_000, "line 1 of .* has more than 33,554,432 bytes"),
        (b"2 2\n\x01" + b"a" * 200_000, "has a word of more than 65,536 bytes"),
        (b"1 3\nabc " + b"1" * 200_000 + b"x 1 2\n", "line 2 of .* must end with 3 numbers"),
        (b"1 2000000\n\x01 " + b"\0" * 8_000_000, "has vectors of size 2000000, but at most 1048576 is accepted"),
        (b"0 3\n\x01", "holds no word vectors"),
    ],
    ids=["line", "word", "digits", "size", "nothing"],
)
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, content, message):
    (tmp_path / "vectors.gz").write_bytes(gzip.compress(content))
    signal.alarm(20)
    with pytest.raises(UserError, match=message):
        read_word_vectors(tmp_path / "vectors.gz")
    signal.alarm(0)
