"""Some items of a sequence of splits, chosen by split, part and label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.facts import FactSequence
from mas_embed.data.split import Part, Split, join_parts
from mas_embed.errors import UserError, unknown_name

PartName = Literal["train", "query", "gallery"]


@dataclass(frozen=True)
class Subset:
    """Items of one or more splits.

    Args:
        part: the items.
        splits: indices of the splits that they are of.
        labels: that were chosen, sorted.
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
        labels: numbers, or names of facts as they are written, `<three, above, seven>`, each for all facts of that name;
            None for all that are there.

    Raises:
        UserError: an unknown split, part or fact, or a label that none of the items has.

    Example:
        >>> from mas_embed.data import digits
        >>> select_subset(digits(num_splits=5), split="2-3", labels=[3]).part.labels.unique()
        tensor([3])
    """
    names = [own.name for own in splits]
    if split is not None and split not in names:
        raise unknown_name("split", split, names)
    if part not in get_args(PartName):
        raise unknown_name("part", part, get_args(PartName))
    indices = [index for index, name in enumerate(names) if split in (None, name)]
    items = join_parts([getattr(splits[index], part) for index in indices])
    present = items.labels.unique()
    if labels is None:
        return Subset(items, indices, present)
    numbers: set[int] = set()
    for label in labels:
        own = _numbers(label, splits) & set(present.tolist())
        if not own:
            where = f"split '{split}'" if split is not None else "all splits"
            raise UserError(f"the {part} part of {where} has no item with the label {label}")
        numbers |= own
    wanted = torch.tensor(sorted(numbers), dtype=torch.long)
    return Subset(_chosen(items, torch.isin(items.labels, wanted)), indices, wanted)


def _numbers(label: int | str, splits: Sequence[Split]) -> set[int]:
    """A label as the data has it: the rows of the facts that were named."""
    if isinstance(label, int):
        return {label}
    if not isinstance(splits, FactSequence):
        raise UserError(f"labels of data without facts are numbers, got '{label}'")
    names = splits.facts.names
    if label not in names:
        raise unknown_name("fact", label, names)
    return {row for row, name in enumerate(names) if name == label}


def _chosen(items: Part, is_chosen: Tensor) -> Part:
    positions = is_chosen.nonzero()[:, 0]
    inputs = items.inputs
    chosen = inputs[positions] if isinstance(inputs, Tensor) else ItemsByPosition(inputs, positions.tolist())
    return Part(chosen, items.labels[positions], items.ids[positions])
