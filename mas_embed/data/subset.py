"""Some items of a sequence of splits, selected by split, part and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.split import Part, Split, SplitSequence, join_parts
from mas_embed.errors import UserError, unknown_name

PartName = Literal["train", "query", "gallery"]


@dataclass(frozen=True)
class Subset:
    """Items of one or more splits.

    Args:
        part: the items.
        splits: indices of the splits that the items are from.
        labels: the selected labels, sorted.
    """

    part: Part
    splits: list[int]
    labels: Tensor


def select_subset(
    splits: Sequence[Split],
    *,
    split: str | None = None,
    part: PartName = "train",
    labels: Sequence[int | str] | None = None,
) -> Subset:
    """The items of some splits that have some labels.

    Args:
        splits: a sequence.
        split: the name of one of them; None for all.
        part: "train", "query" or "gallery".
        labels: numbers, or names as in `SplitSequence.label_names`, each for all labels of that name; None for all labels of
            the items.

    Raises:
        UserError: an unknown split, part or name, or a label that none of the items has.

    Example:
        >>> from mas_embed.data import digits
        >>> select_subset(digits(num_splits=5), split="2-3", labels=[3]).part.labels.unique()
        tensor([3])
    """
    names = [one.name for one in splits]
    if split is not None and split not in names:
        raise unknown_name("split", split, names)
    if part not in get_args(PartName):
        raise unknown_name("part", part, get_args(PartName))
    indices = [index for index, name in enumerate(names) if split in (None, name)]
    items = join_parts([getattr(splits[index], part) for index in indices])
    present = items.labels.unique()
    if labels is None:
        return Subset(items, indices, present)
    selected: set[int] = set()
    for label in labels:
        numbers = _label_numbers(label, splits) & set(present.tolist())
        if not numbers:
            where = f"split '{split}'" if split is not None else "all splits"
            raise UserError(f"the {part} part of {where} has no item with the label {label}")
        selected |= numbers
    wanted = torch.tensor(sorted(selected), dtype=torch.long)
    return Subset(_select_items(items, torch.isin(items.labels, wanted)), indices, wanted)


def _label_numbers(label: int | str, splits: Sequence[Split]) -> set[int]:
    if isinstance(label, int):
        return {label}
    names = splits.label_names if isinstance(splits, SplitSequence) else {}
    if not names:
        raise UserError(f"the labels of this data set have no names, so they are given as numbers, got '{label}'")
    if label not in names:
        raise unknown_name("label", label, names)
    return set(names[label])


def _select_items(items: Part, is_selected: Tensor) -> Part:
    positions = is_selected.nonzero()[:, 0]
    inputs = items.inputs
    selected = inputs[positions] if isinstance(inputs, Tensor) else ItemsByPosition(inputs, positions.tolist())
    return Part(selected, items.labels[positions], items.ids[positions])
