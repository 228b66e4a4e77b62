"""What the readers of fact data share: lists of image files with facts, read line by line and made into splits."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mas_embed.data.facts import FactSequence, FactTable
from mas_embed.data.images import ImageFiles
from mas_embed.data.split import Part, Split
from mas_embed.errors import UserError

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


def hold_out(listed: Listed, *, every: int, seed: int) -> tuple[Listed, Listed]:
    """What remains, and one image in `every` of each fact, drawn at random: at least one where a fact has two or more."""
    generator = np.random.default_rng(seed)
    labels = np.array(listed.labels, dtype=np.int64)
    is_held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        is_held[positions[: max(len(positions) // every, int(len(positions) > 1))]] = True
    return _chosen(listed, ~is_held), _chosen(listed, is_held)


def _chosen(listed: Listed, mask: NDArray[np.bool_]) -> Listed:
    return Listed(list(itertools.compress(listed.paths, mask)), list(itertools.compress(listed.labels, mask)))


def read_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every line of a CSV or JSON Lines file as where it is, for messages, and its values by column; nothing is "".

    Args:
        path: of the file; JSON Lines if it ends in .jsonl or .ndjson, else CSV with a line of column names.
        columns: that must be there.

    Raises:
        UserError: the file cannot be read, or a line lacks a column; names the line.
    """
    read = _json_lines if path.suffix in (".jsonl", ".ndjson") else _csv_lines
    try:
        for number, values in read(path):
            missing = [column for column in columns if values.get(column) is None]
            if missing:
                raise UserError(f"line {number} of {path} lacks {', '.join(missing)}; it needs {', '.join(columns)}")
            yield f"line {number} of {path}", {name: str(value).strip() for name, value in values.items() if name}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no text file of the expected form"
        raise UserError(f"cannot read {path}: {reason}") from None


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for values in reader:
            yield reader.line_num, values


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                values = None
            if not isinstance(values, dict):
                raise UserError(
                    f"line {number} of {path} must be a JSON object such as {{'image': ..., 'subject': ...}}"
                )
            yield number, {name: "" if value is None else value for name, value in values.items()}
