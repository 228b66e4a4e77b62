"""Word vectors, read from word2vec and GloVe files."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import printable, shortened

_NUM_PROBED = 2**16  # bytes after the header that decide whether the file is text or binary
_NUMBER = re.compile(rb"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_MAX_COMPRESSION = 1032  # the largest number of bytes that zlib compresses to one
_MAX_SIZE = 2**20  # of a vector
_MAX_LINE = 2**25  # bytes of a line of text, so that a damaged file does not fill the memory
_MAX_WORD = 2**16  # bytes of a word in a binary file


def read_word_vectors(path: str | Path, words: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The vectors [V] float32 by word, in the order of the file.

    Reads the text and binary formats of word2vec, whose first line is "number-of-words size", and the text format of GloVe,
    which has no such line; the format is detected from the content. A file whose name ends in .gz is decompressed. In a text
    file a word may contain spaces, but it must not end with a space and a number, because that number would be read as one
    more number of the vector.

    Args:
        path: of the file.
        words: the words to read; None for all. Words that are not in the file are left out.

    Raises:
        UserError: the file cannot be read or has none of these formats; the message names the line.
    """
    path = Path(path)
    selected = None if words is None else frozenset(words)
    check_regular_file(path, "the word vectors")
    try:
        with _open(path) as file:
            header = _parse_header(file.readline(_MAX_LINE), path)
            is_text = header is None or _is_text(file.read(_NUM_PROBED), header[1])
        with _open(path) as file:
            if header is None or is_text:
                return _read_text(file, header, selected, path)
            return _read_binary(file, *header, selected, path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the word vectors {path}: {reason}") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _parse_header(line: bytes, path: Path) -> tuple[int, int] | None:
    """The number of words and the size of a vector in the first line; None if the line does not consist of two integers."""
    fields = line.removeprefix(codecs.BOM_UTF8).split()
    if len(fields) != 2 or not all(re.fullmatch(rb"\d{1,18}", field) for field in fields):
        return None
    if int(fields[1]) == 0:
        raise UserError(f"{path} begins with vectors of size 0; give a file of word2vec or GloVe")
    return int(fields[0]), int(fields[1])


def _is_text(start: bytes, size: int) -> bool:
    """Whether the bytes after the header are text: the first line ends with `size` numbers, or there are no control characters.

    Line ends and tabs do not count. Binary numbers contain control characters sooner or later, text files rarely.
    """
    numbers = start.split(b"\n", 1)[0].split()[-size:]
    is_line = len(numbers) == size and all(_NUMBER.fullmatch(number) for number in numbers)
    return is_line or not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", start)


def _read_text(
    file: BinaryIO, header: tuple[int, int] | None, selected: frozenset[str] | None, path: Path
) -> dict[str, Tensor]:
    size = header[1] if header else None
    vectors: dict[str, Tensor] = {}
    num_words = 0
    for number, line in enumerate(iter(partial(file.readline, _MAX_LINE + 1), b""), start=1):
        if len(line) > _MAX_LINE:
            raise UserError(
                f"line {number} of {path} has more than {_MAX_LINE:,} bytes; give a file of word2vec or GloVe"
            )
        fields = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).split()
        if not fields or (header and number == 1):
            continue
        size = size or len(fields) - 1
        spelled = fields[:-size] if size else []
        if not spelled or (len(spelled) > 1 and _NUMBER.fullmatch(spelled[-1])):
            raise UserError(f"line {number} of {path} must hold a word and {size} numbers, got {len(fields)} fields")
        word = b" ".join(spelled).decode(errors="replace")
        num_words += 1
        if selected is None or word in selected:
            vectors.setdefault(word, _parse_vector(fields[-size:], f"line {number} of {path}"))
    if header and num_words < header[0]:
        raise _truncated(path, num_words, header[0])
    return _not_empty(vectors, selected, path)


def _not_empty(vectors: dict[str, Tensor], selected: frozenset[str] | None, path: Path) -> dict[str, Tensor]:
    if not vectors and selected is None:
        raise UserError(f"{path} holds no word vectors; give a file of word2vec or GloVe")
    return vectors


def _truncated(path: Path, num_words: int, num_expected: int) -> UserError:
    return UserError(f"{path} ends after {num_words} of its {num_expected} words; get the whole file")


def _parse_vector(fields: list[bytes], where: str) -> Tensor:
    try:
        vector = torch.tensor([float(field) for field in fields])
    except ValueError:
        raise UserError(f"{where} must end with {len(fields)} numbers") from None
    return _check_finite(vector, where)


def _read_binary(
    file: BinaryIO, num_words: int, size: int, selected: frozenset[str] | None, path: Path
) -> dict[str, Tensor]:
    max_bytes = path.stat().st_size * (_MAX_COMPRESSION if path.suffix == ".gz" else 1)
    if num_words * 4 * size > max_bytes:
        raise UserError(f"{path} is too short for {num_words} vectors of size {size}; get the whole file")
    if size > _MAX_SIZE:
        raise UserError(f"{path} has vectors of size {size}, but at most {_MAX_SIZE} is accepted")
    file.readline()
    vectors: dict[str, Tensor] = {}
    for number in range(num_words):
        word, content = _read_word(file, path), file.read(4 * size)
        if len(content) < 4 * size:
            raise _truncated(path, number, num_words)
        if selected is None or word in selected:
            vector = torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32))
            vectors.setdefault(word, _check_finite(vector, f"the vector of '{_shown(word)}' in {path}"))
    return _not_empty(vectors, selected, path)


def _read_word(file: BinaryIO, path: Path) -> str:
    """The next word, without the space that ends it and the line feed that some programs write before it."""
    letters = bytearray()
    while (letter := file.read(1)) not in (b" ", b""):
        letters += letter
        if len(letters) > _MAX_WORD:
            raise UserError(f"{path} has a word of more than {_MAX_WORD:,} bytes; give a file of word2vec or GloVe")
    return letters.lstrip(b"\n").decode(errors="replace")


def _shown(word: str) -> str:
    return shortened(printable(word), 60)


def _check_finite(vector: Tensor, where: str) -> Tensor:
    if not bool(vector.isfinite().all()):
        raise UserError(f"{where} holds a number that is not finite")
    return vector
