"""What the readers of fact data share: lists of image files with facts, read line by line and made into splits."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mas_embed.data import ImageFiles
from mas_embed.data.split import Part, Split
from mas_embed.errors import UserError
from mas_embed.facts.table import FactSequence, FactTable

MakeInputs = Callable[[Sequence[Path]], ImageFiles]


class Listed(NamedTuple):
    """Image files, and of each the row of its fact."""

    paths: list[Path]
    labels: list[int]


def make_sequence(splits: Mapping[str, tuple[Listed, Listed]], facts: FactTable, inputs: MakeInputs) -> FactSequence:
    """By name of a split, what it is trained on and judged by, as a sequence; images are numbered in that order."""
    numbers = itertools.count()

    def part(listed: Listed) -> Part:
        ids = torch.tensor([next(numbers) for _ in listed.paths], dtype=torch.long)
        return Part(inputs(listed.paths), torch.tensor(listed.labels, dtype=torch.long), ids)

    sequence = []
    for name, (train, held_out) in splits.items():
        judged = part(held_out)
        sequence.append(Split(name, part(train), query=judged, gallery=judged))
    return FactSequence(sequence, facts)


def hold_out(splits: Mapping[str, Listed], *, every: int, seed: int) -> dict[str, tuple[Listed, Listed]]:
    """By name of a split what remains of it, and what is held out. A file is wholly on one side, in all splits.

    Of each fact of a split one in `every` of its files is held out, and at least one where it has two or more. The files of
    each are put in random order; then facts choose in turn, those with the fewest files first: the first of their files,
    until enough are held out, those among them that other facts chose. A file is passed over if it is the last that remains
    of a fact with two or more. So only a fact that shares its files may have more or fewer held out.
    """
    facts = [files for listed in splits.values() for files in _shuffled_files(listed, seed)]
    facts_of: dict[str, list[int]] = {}
    for fact, files in enumerate(facts):
        for file in files:
            facts_of.setdefault(file, []).append(fact)
    num_left = [len(files) for files in facts]
    held: set[str] = set()
    for fact in sorted(range(len(facts)), key=lambda fact: len(facts[fact])):
        size = len(facts[fact])
        for file in facts[fact]:
            is_last = any(num_left[own] == 1 < len(facts[own]) for own in facts_of[file])
            if file not in held and not is_last and num_left[fact] > size - max(size // every, int(size > 1)):
                held.add(file)
                for own in facts_of[file]:
                    num_left[own] -= 1
    return {name: _parted(listed, held) for name, listed in splits.items()}


def _shuffled_files(listed: Listed, seed: int) -> Iterator[list[str]]:
    """The different files of each fact, in the order of the facts' rows."""
    generator = np.random.default_rng(seed)
    labels = np.array(listed.labels, dtype=np.int64)
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        yield list(dict.fromkeys(_file(listed.paths[position]) for position in positions))


def _parted(listed: Listed, held: Set[str]) -> tuple[Listed, Listed]:
    is_held = [_file(path) in held for path in listed.paths]
    return _chosen(listed, [not own for own in is_held]), _chosen(listed, is_held)


def _file(path: Path) -> str:
    """What a file is known by, under whatever path it is listed."""
    return os.path.realpath(path)


def _chosen(listed: Listed, mask: Sequence[bool]) -> Listed:
    return Listed(list(itertools.compress(listed.paths, mask)), list(itertools.compress(listed.labels, mask)))


def read_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every line of a CSV or JSON Lines file as where it is, for messages, and its values by column; nothing is "".

    Args:
        path: of the file; JSON Lines if it ends in .jsonl or .ndjson, else CSV with a line of column names.
        columns: that must be there, in CSV even if no line follows.

    Raises:
        UserError: the file cannot be read, or a line lacks a column; names the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise UserError(f"{path} should be JSON Lines, one object a line, and end in .jsonl, or be CSV")
    try:
        for number, values in _json_lines(path) if suffix in (".jsonl", ".ndjson") else _csv_lines(path, columns):
            _check_columns(values, columns, f"line {number} of {path}")
            yield f"line {number} of {path}", {name: str(value).strip() for name, value in values.items() if name}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no text file of the expected form"
        raise UserError(f"cannot read {path}: {reason}") from None


def _check_columns(values: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if values.get(column) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(columns)}")


def _csv_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _check_columns(dict.fromkeys(reader.fieldnames, ""), columns, f"line 1 of {path}")
        for values in reader:
            yield reader.line_num, values


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested too deeply
                values = None
            if not isinstance(values, dict) or any(isinstance(value, (list, dict)) for value in values.values()):
                raise UserError(
                    f"line {number} of {path} must be a JSON object of plain values such as "
                    "{'image': ..., 'subject': ...}"
                )
            yield number, {name: "" if value is None else value for name, value in values.items()}
