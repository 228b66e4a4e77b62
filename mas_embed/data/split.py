"""A split: the data that is learned in one step of a sequence, and the held-out items on which it is evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mas_embed.errors import UserError
from mas_embed.registry import Registry

DATASETS = Registry("data set")

_UNUSED_IDS = itertools.count(2**40)


@dataclass(frozen=True)
class Part(Dataset[tuple[Any, int]]):
    """Labelled inputs: the training items, the queries or the gallery of a split. Item i is `(inputs[i], labels[i])`.

    Args:
        inputs: anything with a length and items by position: a tensor [N, ...], or a sequence that loads on demand.
        labels: [N] int64.
        ids: [N] int64, which item of the data set each is: an item that is both query and gallery is recognised by its id.
            Left out, they are numbers that no other part has.

    Raises:
        UserError: inputs, labels and ids differ in number.
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
        train: the items that are trained on.
        query: held-out items that are searched for.
        gallery: held-out items that are searched, together with those of every other split. May be the same object as
            `query`: each query's own item is then left out by its id.
    """

    name: str
    train: Part
    query: Part
    gallery: Part


class SplitSequence(list[Split]):
    """A sequence of splits with further knowledge of its data; a data set without any may return a plain list.

    Args:
        splits: in the order in which they are learned.
        label_names: by name the labels that it stands for, so that a config can select items by name.
        provides: values that other components of a config may need, by the name of their option: a loss with an option
            `vector_size` is given `provides["vector_size"]`. The names are repeated where the data set is registered,
            `DATASETS.register(..., provides=[...])`.
    """

    def __init__(
        self,
        splits: Iterable[Split],
        *,
        label_names: Mapping[str, Sequence[int]] | None = None,
        provides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(splits)
        self.label_names = dict(label_names or {})
        self.provides = dict(provides or {})


def check_splits(splits: Sequence[Split]) -> None:
    """Refuses a sequence that cannot be trained or evaluated.

    Raises:
        UserError: no splits, two of one name, or an empty part.
    """
    if not splits:
        raise UserError("a sequence needs at least one split")
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise UserError(f"the names of splits must differ, got {names}")
    for split in splits:
        for part_name in ("train", "query", "gallery"):
            if len(getattr(split, part_name)) == 0:
                raise UserError(f"split '{split.name}' has an empty {part_name} part")


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
