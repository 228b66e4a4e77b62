"""Lists of image files with their facts: read line by line, divided into training and held-out files, made into splits."""

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

from mas_embed.data import ImageFiles, Part, Split
from mas_embed.errors import UserError
from mas_embed.facts.table import FactSequence, FactTable
from mas_embed.runtime.checks import check_at_least
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import shortened

MakeInputs = Callable[[Sequence[Path]], ImageFiles]

MOST_CHARACTERS = 10_000  # of a value in a list


class ListedImages(NamedTuple):
    """Image files, and for each the row of its fact in the table of facts. A file with several facts is listed several times."""

    paths: list[Path]
    labels: list[int]


def make_sequence(
    images_by_split: Mapping[str, tuple[ListedImages, ListedImages]], facts: FactTable, make_inputs: MakeInputs
) -> FactSequence:
    """The sequence of splits with these images.

    Args:
        images_by_split: by name of a split its training images and its held-out images, which are both queries and gallery.
        facts: the table whose rows are the labels.
        make_inputs: makes the inputs of a part from its files.
    """
    next_id = itertools.count()

    def make_part(images: ListedImages) -> Part:
        ids = torch.tensor([next(next_id) for _ in images.paths], dtype=torch.long)
        return Part(make_inputs(images.paths), torch.tensor(images.labels, dtype=torch.long), ids)

    splits = []
    for name, (train, held_out) in images_by_split.items():
        evaluated = make_part(held_out)
        splits.append(Split(name, make_part(train), query=evaluated, gallery=evaluated))
    return FactSequence(splits, facts)


def hold_out(
    images_by_split: Mapping[str, ListedImages], *, every: int, seed: int
) -> dict[str, tuple[ListedImages, ListedImages]]:
    """By name of a split its remaining images and its held-out images. A file is on the same side in all splits.

    Of the files of each fact of a split, one in `every` is held out, and at least one if there are two or more. The files of
    each fact are shuffled, and the facts are visited from those with the fewest files to those with the most. A fact holds
    out its files in order until it has enough, where files that were held out for facts visited before count too. A file is
    skipped if it is the last remaining file of a fact that has two or more. So the number of held-out files can differ from
    the rule only for facts that share files with others.

    Args:
        images_by_split: by name of a split all of its images.
        every: one file of so many is held out.
        seed: of the shuffling.

    Raises:
        UserError: the seed is negative.
    """
    check_at_least("seed", seed, 0)
    files_by_fact = [files for images in images_by_split.values() for files in _shuffled_files(images, seed)]
    facts_by_file: dict[str, list[int]] = {}
    for fact, files in enumerate(files_by_fact):
        for file in files:
            facts_by_file.setdefault(file, []).append(fact)
    num_files = [len(files) for files in files_by_fact]
    num_remaining = list(num_files)
    held_out: set[str] = set()
    for fact in sorted(range(len(num_files)), key=lambda fact: num_files[fact]):
        num_wanted = max(num_files[fact] // every, int(num_files[fact] > 1))
        for file in files_by_fact[fact]:
            is_last = any(num_remaining[other] == 1 < num_files[other] for other in facts_by_file[file])
            has_enough = num_remaining[fact] <= num_files[fact] - num_wanted
            if file not in held_out and not is_last and not has_enough:
                held_out.add(file)
                for other in facts_by_file[file]:
                    num_remaining[other] -= 1
    return {name: _divide(images, held_out) for name, images in images_by_split.items()}


def _shuffled_files(images: ListedImages, seed: int) -> Iterator[list[str]]:
    """The different files of each fact in random order; the facts are in the order of their rows."""
    generator = np.random.default_rng(seed)
    labels = np.array(images.labels, dtype=np.int64)
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        yield list(dict.fromkeys(_real_path(images.paths[position]) for position in positions))


def _divide(images: ListedImages, held_out: Set[str]) -> tuple[ListedImages, ListedImages]:
    """The images whose files are not held out, and those whose files are."""
    is_held_out = [_real_path(path) in held_out for path in images.paths]
    return _select(images, [not is_out for is_out in is_held_out]), _select(images, is_held_out)


def _real_path(path: Path) -> str:
    """The path without links and "..", so that a file is recognised however it is listed."""
    return os.path.realpath(path)


def _select(images: ListedImages, mask: Sequence[bool]) -> ListedImages:
    return ListedImages(list(itertools.compress(images.paths, mask)), list(itertools.compress(images.labels, mask)))


def read_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields for every line its location, such as "line 3 of facts.csv", and its values by column; an empty value is "".

    Args:
        path: a JSON Lines file if the name ends in .jsonl or .ndjson, otherwise a CSV file with a line of column names.
        columns: the required columns. A CSV file must name them even if no other line follows.

    Raises:
        UserError: the file cannot be read, or a line lacks a column or has a value of more than 10,000 characters; the message
            names the line.
    """
    check_regular_file(path, "the list")
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise UserError(
            f"{path} is a JSON file; give CSV, or JSON Lines (one object a line, in a file that ends in .jsonl)"
        )
    try:
        for number, values in _json_lines(path) if suffix in (".jsonl", ".ndjson") else _csv_lines(path, columns):
            _check_columns(values, columns, f"line {number} of {path}")
            texts = {name: str(value).strip() for name, value in values.items() if name}
            _check_lengths(texts, f"line {number} of {path}")
            yield f"line {number} of {path}", texts
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file in UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None


def _check_columns(values: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if values.get(column) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it needs {', '.join(columns)}")


def _check_lengths(texts: Mapping[str, str], where: str) -> None:
    for name, text in texts.items():
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"{where} has {len(text):,} characters in the column {shortened(repr(name))}, but at most "
                f"{MOST_CHARACTERS:,} are accepted"
            )


def _csv_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the number and the values of every line of a CSV file after the line of column names."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(dict.fromkeys(reader.fieldnames, ""), columns, f"line 1 of {path}")
            for values in reader:
                yield reader.line_num, values
        except csv.Error as error:
            raise UserError(f"line {reader.reader.line_num} of {path} is not valid CSV: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the number and the values of every line of a JSON Lines file that is not empty."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, an integer of thousands of digits, or nested too deeply
                values = None
            if not isinstance(values, dict) or any(isinstance(value, (list, dict)) for value in values.values()):
                raise UserError(
                    f"line {number} of {path} must be a JSON object of plain values such as "
                    "{'image': ..., 'subject': ...}"
                )
            yield number, {name: "" if value is None else value for name, value in values.items()}
