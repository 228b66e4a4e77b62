"""Subsets of the items of a sequence of splits, selected by split, part and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.split import Part, Split, SplitSequence, join_parts
from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.text import printable, shortened

PartName = Literal["train", "query", "gallery"]


@dataclass(frozen=True)
class Subset:
    """Selected items of one or more splits.

    Args:
        part: the items.
        splits: the indices of the splits that the items come from.
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
    """The items of one split or of all splits that have one of the given labels.

    Args:
        splits: the sequence.
        split: the name of the split to select from; None for all splits.
        part: the part to select from: "train", "query" or "gallery".
        labels: numbers, or names from `SplitSequence.label_names`, each of which selects all labels with that name; None
            selects every item.

    Raises:
        UserError: the split, the part or a name is unknown, or no item of the part has one of the labels.

    Examples:
        >>> from mas_embed.data import digits
        >>> select_subset(digits(num_splits=5), split="2-3", labels=[3]).part.labels.unique()
        tensor([3])
    """
    names = [one.name for one in splits]
    if split is not None and split not in names:
        raise unknown_name("split", split, names)
    check_choice("part", part, get_args(PartName))
    indices = [index for index, name in enumerate(names) if split in (None, name)]
    parts = [getattr(splits[index], part) for index in indices]
    for index, one in zip(indices, parts, strict=True):
        if not len(one):
            raise UserError(
                f"the {part} part of split '{names[index]}' is to be selected from, but its data is missing"
            )
    items = join_parts(parts)
    present = items.labels.unique()
    if labels is None:
        return Subset(items, indices, present)
    selected: set[int] = set()
    for label in labels:
        numbers = _label_numbers(label, splits) & set(present.tolist())
        if not numbers:
            where = f"split '{split}'" if split is not None else "all splits"
            raise UserError(f"the {part} part of {where} has no item with the label {shortened(printable(str(label)))}")
        selected |= numbers
    wanted = torch.tensor(sorted(selected), dtype=torch.long)
    return Subset(_select_items(items, torch.isin(items.labels, wanted)), indices, wanted)


def _label_numbers(label: int | str, splits: Sequence[Split]) -> set[int]:
    """The labels that a number or a name stands for."""
    if isinstance(label, int):
        return {label}
    names = splits.label_names if isinstance(splits, SplitSequence) else {}
    if not names:
        raise UserError(
            f"the labels of this data set have no names; give them as numbers, got {shortened(repr(label))}"
        )
    if label not in names:
        raise unknown_name("label", label, names)
    return set(names[label])


def _select_items(items: Part, is_selected: Tensor) -> Part:
    positions = is_selected.nonzero()[:, 0]
    augmented = None if items.augmented is None else _at(items.augmented, positions)
    return Part(_at(items.inputs, positions), items.labels[positions], items.ids[positions], augmented)


def _at(inputs: Any, positions: Tensor) -> Any:
    return inputs[positions] if isinstance(inputs, Tensor) else ItemsByPosition(inputs, positions.tolist())
