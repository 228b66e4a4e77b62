import json
import os
import random
import signal
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from mas_embed import UserError
from mas_embed.cli import main
from mas_embed.facts import read_fact_list

FACTS = [
    ("cat", "", ""),
    ("cat", "on", ""),
    ("cat", "on", "mat"),
    ("dog", "", ""),
    ("dog", "on", "mat"),
    ("dog", "on", ""),
]
PER_FACT = 8


def write_list(folder, *, suffix="csv", extra=None, facts=FACTS):
    """Every image has the colour (row of its fact, its number, 0); `extra(fact, number)` gives more columns."""
    rows = []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for fact, words in enumerate(facts):
        for number in range(PER_FACT):
            link = f"pictures/{fact}_{number}.png"
            Image.fromarray(np.full((4, 4, 3), [fact, number, 0], dtype=np.uint8)).save(folder / link)
            row = dict(zip(("image", "subject", "predicate", "object"), (link, *words), strict=True))
            rows.append(row | (extra(fact, number) if extra else {}))
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    if suffix == "jsonl":
        lines = [json.dumps({key: value or None for key, value in row.items()}) for row in rows]
    (folder / f"list.{suffix}").write_text("\n".join(lines) + "\n")
    (folder / "vectors.txt").write_text("cat 1 0 0\ndog 0 2 0\non 0 0 3\nmat 1 1 0\nunused 1 2 3\n")
    return folder


def read(folder, *, suffix="csv", **options):
    defaults = {"image_size": 4, "normalization": "none", "num_splits": 2}
    return read_fact_list(
        path=str(folder / f"list.{suffix}"), word_vectors=str(folder / "vectors.txt"), **defaults | options
    )


def images_of(part):
    """(row of the fact, number) of every image, after a check that it has the fact's label."""
    seen = []
    for image, label in part:
        fact, number, _ = (image[:, 0, 0] * 255).round().int().tolist()
        assert label == fact
        seen.append((fact, number))
    return seen


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("grouping", ["random", "semantic"])
def test_facts_are_assigned_to_splits_and_every_image_has_its_fact(tmp_path, suffix, grouping):
    splits = read(write_list(tmp_path, suffix=suffix), suffix=suffix, splits=grouping)
    assert splits.facts.words == FACTS
    assert [split.name for split in splits] == ["1", "2"]
    images = []
    for split in splits:
        assert split.train.labels.unique().tolist() == split.query.labels.unique().tolist()
        assert len(split.train.labels.unique()) == 3
        assert [split.query.labels.tolist().count(label) for label in split.query.labels.unique()] == [2, 2, 2]
        images += images_of(split.train) + images_of(split.query)
    assert sorted(images) == [(fact, number) for fact in range(6) for number in range(PER_FACT)]


def test_parts_and_splits_as_given(tmp_path):
    def extra(fact, number):
        return {"part": "test" if number >= 5 else "train", "split": "later" if fact < 2 else "sooner"}

    splits = read(write_list(tmp_path, extra=extra), splits="given")
    assert [split.name for split in splits] == ["later", "sooner"]
    assert images_of(splits[0].train) == [(fact, number) for fact in range(2) for number in range(5)]
    assert images_of(splits[1].query) == [(fact, number) for fact in range(2, 6) for number in range(5, 8)]
    validation = read(tmp_path, splits="given", held_out="validation")
    held = set(images_of(validation[0].query))
    assert held and held | set(images_of(validation[0].train)) == set(images_of(splits[0].train))


def test_predicate_and_object_may_be_left_out(tmp_path):
    folder = write_list(tmp_path, facts=[("cat", "", ""), ("dog", "", "")])
    rows = [",".join(line.split(",")[:2]) for line in (folder / "list.csv").read_text().splitlines()]
    (folder / "list.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    assert read(folder).facts.orders.tolist() == [1, 1]


def test_words_without_a_vector_are_listed(tmp_path):
    with pytest.raises(
        UserError, match="2 words have no vector: bird, blue; add their vectors, or leave out their facts"
    ):
        read(write_list(tmp_path, facts=[("cat", "", ""), ("blue bird", "on", "")]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pictures/0_0.png,,on,mat", "line 50 of .* needs a subject"),
        ("pictures/0_0.png,cat,,mat", "line 50 of .* a predicate where it has an object"),
        ("pictures/gone.png,cat,on,mat", "line 50 of .*list.csv lists 'pictures/gone.png', but there is no"),
        ("../x.png,cat,on,mat", "line 50 of .*list.csv lists '../x.png', which lies outside"),
        ("pictures/0_0.png", "line 50 of .*list.csv lacks subject"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, line, message):
    folder = write_list(tmp_path)
    with (folder / "list.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        read(folder)


def test_options_and_lists_that_cannot_be_used(tmp_path):
    folder = write_list(tmp_path, extra=lambda fact, number: {"part": "train" if number else "all"})
    with pytest.raises(UserError, match="line 2 of .* has the part 'all'"):
        read(folder)
    with pytest.raises(UserError, match="line 1 of .* lacks split"):
        read(folder, splits="given")
    with pytest.raises(UserError, match="splits must be 'given', 'random' or 'semantic', got 'clusters'"):
        read(folder, splits="clusters")
    (folder / "list.jsonl").write_text('{"image": "a"}\n{"image"\n')
    with pytest.raises(UserError, match="line 1 of .* lacks subject"):
        read(folder, suffix="jsonl")
    lines = ['["image"]', '{"image": ["a.png"], "subject": "cat"}', "[" * 100_000, '{"image": ' + "1" * 5000 + "}"]
    for line in lines:
        (folder / "list.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(UserError, match="line 2 of .* must be a JSON object"):
            read(folder, suffix="jsonl")
    (folder / "list.csv").write_text("image,subject\n")
    with pytest.raises(UserError, match="list.csv lists no images"):
        read(folder)
    (folder / "list.csv").write_bytes(b"image,subject\n\xff\xfe,cat\n")
    with pytest.raises(UserError, match="cannot read .*list.csv: it is not a text file in UTF-8"):
        read(folder)


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_an_image_of_several_facts_is_in_one_part(tmp_path, held_out):
    folder = write_list(tmp_path)
    links = [f"pictures/0_{number}.png" for number in range(PER_FACT)]
    lines = [",".join((link, *words)) for link in links for words in FACTS[:3]]
    (folder / "list.csv").write_text("\n".join(["image,subject,predicate,object", *lines]))
    splits = read(folder, held_out=held_out)
    trained, evaluated = (
        {path for split in splits for path in getattr(split, part).inputs.paths} for part in ("train", "query")
    )
    assert len(evaluated) == (2 if held_out == "test" else 1) and not trained & evaluated


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_every_line_names_its_split_where_splits_are_given(tmp_path, suffix):
    folder = write_list(tmp_path, suffix=suffix, extra=lambda fact, number: {"split": "" if fact == 1 else "one"})
    with pytest.raises(UserError, match=rf"line {9 if suffix == 'jsonl' else 10} of .* names no split"):
        read(folder, suffix=suffix, splits="given")
    assert len(read(folder, suffix=suffix)) == 2


def test_suffixes_in_capitals_and_json_that_is_not_json_lines(tmp_path):
    folder = write_list(tmp_path, suffix="jsonl")
    (folder / "list.jsonl").rename(folder / "list.JSONL")
    assert len(read(folder, suffix="JSONL").facts) == 6
    (folder / "list.json").write_text("[]")
    with pytest.raises(UserError, match="list.json is a JSON file; give CSV, or JSON Lines"):
        read(folder, suffix="json")


HOSTILE = [
    b"\0", b"\r\n", b"1e999", b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b'"', b",", b"{", b"[", b"x" * 140_000, b"../..", b"\\udcff",
]  # fmt: skip


def damaged(content, random_bytes):
    """The content with a piece replaced, with its end missing, or with something hostile in it."""
    start = random_bytes.randrange(len(content))
    end = random_bytes.choice([start, start, start + 1, start + 9, len(content)])
    return content[:start] + random_bytes.choice([*HOSTILE, b"", bytes([random_bytes.randrange(256)])]) + content[end:]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_damaged_list_is_read_or_refused_in_one_sentence(tmp_path, suffix):
    folder, random_bytes = write_list(tmp_path, suffix=suffix), random.Random(0)
    path = folder / f"list.{suffix}"
    content, messages = path.read_bytes(), []
    for _ in range(100):
        path.write_bytes(damaged(content, random_bytes))
        try:
            read(folder, suffix=suffix)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert all("\n" not in message and len(message) < 700 for message in messages)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_line_ends_and_byte_order_marks(tmp_path, suffix):
    folder = write_list(tmp_path, suffix=suffix)
    path = folder / f"list.{suffix}"
    content = path.read_bytes()
    for accepted in (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r")):
        path.write_bytes(accepted)
        assert len(read(folder, suffix=suffix).facts) == 6
    for refused in (content.decode().encode("utf-16"), b"", b"\n\n", content + b"\xe9\n"):
        path.write_bytes(refused)
        with pytest.raises(UserError, match=f"{path}"):
            read(folder, suffix=suffix)


def test_values_that_are_too_long_are_named(tmp_path):
    folder = write_list(tmp_path)
    for length, message in (
        (20_000, "line 50 of .* has 20,000 characters in the column 'image'"),
        (200_000, "line 50 of .* not valid CSV"),
    ):
        lines = (folder / "list.csv").read_text().splitlines()[:49]
        (folder / "list.csv").write_text("\n".join([*lines, "x" * length + ",cat,,"]) + "\n")
        with pytest.raises(UserError, match=message):
            read(folder)


def test_what_is_no_file_is_never_waited_for(tmp_path):
    folder = write_list(tmp_path)
    os.mkfifo(folder / "pipe.csv")
    signal.alarm(20)
    with pytest.raises(UserError, match="cannot read the list .*pipe.csv: it is a pipe, a socket or a device"):
        read_fact_list(path=str(folder / "pipe.csv"), word_vectors="none")
    with pytest.raises(UserError, match="cannot read the list .*: it is a folder"):
        read_fact_list(path=str(folder), word_vectors="none")
    (folder / "pictures" / "0_0.png").unlink()
    os.mkfifo(folder / "pictures" / "0_0.png")
    with pytest.raises(UserError, match="line 2 of .* lists 'pictures/0_0.png', but there is no such file"):
        read(folder)
    signal.alarm(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_splits": 0}, "num_splits must lie between 1 and 6"),
        ({"image_size": 10**9}, "size <= short_side <= 16384, got size 1000000000"),
        ({"keep_megabytes": -1}, "keep_megabytes must be at least 0, got -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        read(write_list(tmp_path), **options)


def test_the_command_check_on_images_that_load_when_they_are_used(tmp_path, monkeypatch, capsys):
    folder = write_list(tmp_path)
    config = {
        "name": "listed",
        "data": {"name": "fact_list", "path": str(folder / "list.csv"), "word_vectors": str(folder / "vectors.txt"), "num_splits": 2,
                 "image_size": 28},
        "model": {"name": "small_fact_conv", "channels": 3, "width": 2, "hidden": 8},
        "loss": "facts",
        "methods": ["finetune", "mas", {"name": "mas", "label": "on cats", "importance": {"data": "cats"}}, "joint"],
        "subsets": {"cats": {"labels": ["<cat>"]}},
        "training": {"epochs": 1, "batch_size": 8},
        "evaluation": {"name": "facts"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["mas-embed", "check", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.err) == (0, "")
    assert "16 of 16 parameters are trained" in shown.out
