"""A split: what is learned in one step of the sequence, and what it is judged by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mas_embed.errors import UserError

_UNUSED_IDS = itertools.count(2**40)


@dataclass(frozen=True)
class Part(Dataset[tuple[Any, int]]):
    """Labelled inputs: what a split trains on, asks with, or is searched in. Item i is `(inputs[i], labels[i])`.

    Args:
        inputs: anything with a length and items by position: a tensor [N, ...], or a sequence that loads on demand.
        labels: [N] int64.
        ids: [N] int64, which item of the data set each is: an item that is both query and gallery is known by its id. Left
            out, they are numbers that no other part has.
    """

    inputs: Any
    labels: Tensor
    ids: Tensor = field(default=torch.empty(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if len(self.ids) == 0:
            object.__setattr__(self, "ids", torch.tensor([next(_UNUSED_IDS) for _ in range(len(self.labels))]).long())
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise UserError(
                f"a part has {len(self.inputs)} inputs, {len(self.labels)} labels and {len(self.ids)} ids; give one each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.inputs[index], int(self.labels[index])


@dataclass(frozen=True)
class Split:
    """One element of a sequence of splits.

    Args:
        name: shown in tables and figures.
        train: what is learned.
        query: held-out items that are looked for.
        gallery: held-out items that are searched, together with those of every other split; may be the very `query`,
            whose own items are then left out by their ids.
    """

    name: str
    train: Part
    query: Part
    gallery: Part


def join_parts(parts: Sequence[Part]) -> Part:
    """All items of several parts as one, in order; ids stay. Inputs that load on demand still do.

    Example:
        >>> part = Part(torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> len(join_parts([part, part]))
        4
    """
    inputs = [part.inputs for part in parts]
    return Part(
        torch.cat(inputs) if all(isinstance(values, Tensor) for values in inputs) else ConcatDataset(inputs),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.ids for part in parts]),
    )


def join_splits(splits: Sequence[Split], name: str = "all") -> Split:
    """The sequence as one split that holds everything: training on it is joint training."""
    return Split(
        name,
        join_parts([split.train for split in splits]),
        join_parts([split.query for split in splits]),
        join_parts([split.gallery for split in splits]),
    )
