"""Lists of image files with their facts: divided into training and held-out files, and made into splits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mas_embed.data import ImageFiles, Part, Split
from mas_embed.facts.table import FactSequence, FactTable
from mas_embed.runtime.checks import check_at_least

MakeInputs = Callable[[Sequence[Path]], ImageFiles]


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
