"""Splits, which are the elements of a sequence: training items, and held-out items for evaluation."""

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
    """Inputs with labels: the training items, the queries or the gallery of a split. Item i is `(inputs[i], labels[i])`.

    Args:
        inputs: a tensor [N, ...], or a sequence that loads its items when they are indexed.
        labels: [N] int64.
        ids: [N] int64, the identity of each item in the data set, by which an item that is both a query and in the gallery is
            recognised. By default, the items get ids that no other part has.

    Raises:
        UserError: the numbers of inputs, labels and ids differ.
    """

    inputs: Any
    labels: Tensor
    ids: Tensor = field(default=torch.empty(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if self.labels.is_floating_point() or self.labels.is_complex():
            raise UserError(f"the labels of a part must be integers, got {self.labels.dtype}")
        if len(self.ids) == 0:
            object.__setattr__(self, "ids", torch.tensor([next(_UNUSED_IDS) for _ in range(len(self.labels))]).long())
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise UserError(
                f"a part has {len(self.inputs)} inputs, {len(self.labels)} labels and {len(self.ids)} ids; give as many of each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.inputs[index], int(self.labels[index])


@dataclass(frozen=True)
class Split:
    """One element of a sequence of splits.

    Args:
        name: the name of the split in tables and figures.
        train: the items that are trained on.
        query: held-out items, each of which is a query for items of its class.
        gallery: held-out items that are searched, together with the galleries of all other splits. It may be the same object
            as `query`; a query never finds the gallery item with its own id.
    """

    name: str
    train: Part
    query: Part
    gallery: Part


class SplitSequence(list[Split]):
    """A list of splits with names for its labels and values for other components. Both are optional.

    A data set that has neither may return a plain list of splits.

    Args:
        splits: the splits in the order in which they are learned.
        label_names: for each name the labels that have it, so that a config can select items by name.
        provides: values for options of other components in a config: a loss with an option `vector_size` is given
            `provides["vector_size"]`. The names must also be given when the data set is registered, as in
            `DATASETS.register(..., provides=["vector_size"])`.
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
    """Raises `UserError` for a sequence that cannot be trained on or evaluated.

    Raises:
        UserError: there is no split, two splits have the same name, or a part is empty.
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
    """One part with the items of several parts, in order and with their ids. Inputs that load on demand still do so.

    Examples:
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
    """One split with the items of all splits of a sequence; training on it is joint training."""
    return Split(
        name,
        join_parts([split.train for split in splits]),
        join_parts([split.query for split in splits]),
        join_parts([split.gallery for split in splits]),
    )
