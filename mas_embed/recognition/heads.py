"""Which head the classes of a sequence of splits belong to. S splits, C classes of all of them together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number, shown


def check_classes_per_split(classes_per_split: Sequence[int]) -> list[int]:
    """The numbers of classes as a list.

    Raises:
        UserError: there is no split, or a split has no class.
    """
    if not isinstance(classes_per_split, Sequence) or isinstance(classes_per_split, str) or not classes_per_split:
        raise UserError(
            f"classes_per_split must be the number of classes of every split, as in [10, 62], got {shown(classes_per_split)}"
        )
    return [as_whole_number("every number in classes_per_split", number, 1) for number in classes_per_split]


def split_of_classes(classes_per_split: Sequence[int]) -> Tensor:
    """The index of the split, and so of the head, of every class [C] int64.

    The classes of the first split are 0, 1, ..., those of the second split follow, and so on.

    Examples:
        >>> split_of_classes([2, 3])
        tensor([0, 0, 1, 1, 1])
    """
    counts = torch.tensor(check_classes_per_split(classes_per_split))
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def without_other_heads(scores: Tensor, labels: Tensor, split_of_class: Tensor) -> Tensor:
    """The class scores [N, C], with minus infinity for the classes of all heads but that of the sample's own split.

    Args:
        scores: [N, C], those of all heads side by side.
        labels: [N] int64, from 0 to C - 1.
        split_of_class: [C], see `split_of_classes`.

    Returns:
        [N, C]. No gradient reaches the scores that were replaced.
    """
    is_other = split_of_class[None, :] != split_of_class[labels][:, None]
    return scores.masked_fill(is_other, -torch.inf)


def check_scores(scores: Tensor, num_classes: int) -> None:
    """Raises `UserError` unless the scores have the shape [N, C]."""
    if scores.ndim != 2 or scores.shape[1] != num_classes:
        raise UserError(
            f"the splits have {num_classes} classes, so class scores must have shape [N, {num_classes}], got "
            f"{list(scores.shape)}; take the model multi_head"
        )


def check_labels(labels: Tensor, num_classes: int, *, of: str) -> None:
    """Raises `UserError` unless all labels are from 0 to C - 1; `of` says whose they are."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UserError(
            f"the labels {of} must be from 0 to {num_classes - 1}, the classes of all splits in their order, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
