"""Splits, which are the elements of a sequence: training items, and held-out items for evaluation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.runtime.arrays import as_integers
from mas_embed.runtime.preprocessing import Preprocessing

if TYPE_CHECKING:
    from mas_embed.data.learned import LearnedSplits

DATASETS = Registry("data set")

FIRST_FREE_ID = 2**40  # that parts without ids of their own are given
_UNUSED_IDS = itertools.count(FIRST_FREE_ID)


@dataclass(frozen=True)
class Part(Dataset[tuple[Any, int]]):
    """Inputs with labels: the training items, the queries or the gallery of a split. Item i is `(inputs[i], labels[i])`.

    A part has two views. The clean view, `inputs`, is what is measured on: importance, everything that a method stores when a
    split ends, compensations and evaluation. The training view, `augmented`, is what a network is trained on.

    Args:
        inputs: a tensor or an array [N, ...], or a sequence that loads its items when they are indexed.
        labels: [N] integers, which are stored as an int64 tensor.
        ids: [N] integers, stored likewise: the identity of each item in the data set, by which an item that is both a query
            and in the gallery is recognised. By default, the items get ids that no other part has.
        augmented: a sequence of N inputs, whose item i is input i changed at random each time it is indexed. It may draw from
            the global generators of Python, NumPy and torch (on the CPU), which training seeds for every item. None if a
            network is trained on `inputs` as they are.
        preprocessing: how the colours of `inputs` were normalized, so that they can be shown as they were; None if they were not,
            or if the inputs know it.

    Raises:
        UserError: the inputs are no sequence, the labels or ids are not integers, or their numbers differ.

    Examples:
        >>> from torchvision.transforms import v2
        >>> class Flipped(list):
        ...     def __getitem__(self, index):
        ...         return v2.RandomHorizontalFlip()(super().__getitem__(index))
        >>> images = torch.rand(2, 3, 4, 4)
        >>> part = Part(images, torch.tensor([0, 1]), augmented=Flipped(images))
        >>> torch.equal(part[0][0], images[0])
        True
    """

    inputs: Any
    labels: Tensor
    ids: Tensor = field(default=torch.empty(0, dtype=torch.long))
    augmented: Any = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        num_inputs = _num_inputs(self.inputs)
        labels = as_integers(self.labels, "the labels of a part")
        ids = as_integers(self.ids, "the ids of a part")
        if len(ids) == 0:
            ids = torch.tensor([next(_UNUSED_IDS) for _ in range(len(labels))]).long()
        if not num_inputs == len(labels) == len(ids):
            raise UserError(
                f"a part has {num_inputs} inputs, {len(labels)} labels and {len(ids)} ids; give as many of each"
            )
        if self.augmented is not None and _num_inputs(self.augmented) != num_inputs:
            raise UserError(
                f"a part has {num_inputs} inputs, but {len(self.augmented)} augmented ones; give as many of each"
            )
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.inputs[index], int(self.labels[index])


def _num_inputs(inputs: Any) -> int:
    """The number of items that can be indexed; raises `UserError` for inputs that are not a sequence."""
    try:
        if hasattr(inputs, "__getitem__") and not isinstance(inputs, Mapping | Set | str | bytes):
            return len(inputs)
    except TypeError:  # no length, or a tensor or an array without dimensions
        pass
    raise UserError(
        "the inputs of a part must be a tensor, an array or a sequence with a length, "
        f"got an object of type {type(inputs).__name__}"
    )


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

    Attributes:
        normalization: how the colours of tensors were normalized by `transform_splits`; None if they were not.
        learned: what is remembered of the splits of this sequence that were learned in an earlier session; None for a new one.
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
        self.normalization: Preprocessing | None = None
        self.learned: LearnedSplits | None = None

    @overload
    def __getitem__(self, index: SupportsIndex) -> Split: ...
    @overload
    def __getitem__(self, index: slice) -> SplitSequence: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Split | SplitSequence:
        """A split; or several splits with all that is known of the sequence."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        some = copy.copy(self)
        some[:] = super().__getitem__(index)
        return some


def check_splits(splits: Sequence[Split], *, may_be_missing: bool = False) -> None:
    """Raises `UserError` for a sequence that cannot be trained on or evaluated.

    Args:
        splits: the sequence.
        may_be_missing: whether parts may be empty, as those of splits that were learned before and whose data is gone.

    Raises:
        UserError: it is not a sequence of `Split`, there is no split, two splits have the same name, or a part is empty.
    """
    if isinstance(splits, str | bytes) or not isinstance(splits, Sequence):
        raise UserError(f"splits must be a sequence of Split, got an object of type {type(splits).__name__}")
    if not splits:
        raise UserError("a sequence needs at least one split")
    for split in splits:
        if not isinstance(split, Split):
            raise UserError(
                f"splits must be a sequence of Split, got one that holds an object of type {type(split).__name__}"
            )
        if not isinstance(split.name, str):
            raise UserError(f"the name of a split must be a string, got {split.name!r}")
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise UserError(f"the names of splits must differ, got {names}")
    for split in splits:
        for part_name in ("train", "query", "gallery"):
            part = getattr(split, part_name)
            if not isinstance(part, Part):
                raise UserError(
                    f"{part_name} of split '{split.name}' must be a Part, got an object of type {type(part).__name__}"
                )
            if len(part) == 0 and not may_be_missing:
                raise UserError(f"split '{split.name}' has an empty {part_name} part")


def missing_split(name: str) -> Split:
    """A split that was learned before and whose data is gone: it has no items, and is neither trained nor evaluated.

    Args:
        name: under which the split was learned.
    """
    return Split(name, empty_part(), empty_part(), empty_part())


def empty_part() -> Part:
    """A part without items, which stands for one whose data is gone."""
    return Part(torch.empty(0), torch.empty(0, dtype=torch.long))


def join_parts(parts: Sequence[Part]) -> Part:
    """One part with the items of several parts, in order and with their ids. Inputs that load on demand still do so.

    Examples:
        >>> part = Part(torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> len(join_parts([part, part]))
        4
    """
    is_augmented = any(part.augmented is not None for part in parts)
    return Part(
        _joined([part.inputs for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.ids for part in parts]),
        _joined([part.inputs if part.augmented is None else part.augmented for part in parts])
        if is_augmented
        else None,
    )


def _joined(inputs: list[Any]) -> Any:
    return torch.cat(inputs) if all(isinstance(values, Tensor) for values in inputs) else ConcatDataset(inputs)


def join_splits(splits: Sequence[Split], name: str = "all") -> Split:
    """One split with the items of all splits of a sequence; training on it is joint training."""
    return Split(
        name,
        join_parts([split.train for split in splits]),
        join_parts([split.query for split in splits]),
        join_parts([split.gallery for split in splits]),
    )
