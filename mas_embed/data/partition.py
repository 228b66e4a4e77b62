"""The division of a data set into training, validation and test items."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mas_embed.runtime.checks import as_whole_number, check_choice

HeldOut = Literal["test", "validation"]


def check_held_out(held_out: str) -> None:
    """Raises `UserError` unless `held_out` is "test" or "validation"."""
    check_choice("held_out", held_out, get_args(HeldOut))


def partition(
    labels: Tensor, held_out: HeldOut, seed: int, *, fewest: int = 0, has_test: bool = False
) -> tuple[Tensor, Tensor]:
    """The positions of the training items and of the held-out items of a data set.

    Of every class, a quarter of the items is drawn for testing, and a fifth of the others for validation. The remaining items
    are for training.

    Args:
        labels: [N].
        held_out: whether the test items or the validation items are returned as held out. The other ones are in neither
            result.
        seed: of the random draw.
        fewest: the smallest number of items of a class that is drawn for testing, and for validation; none is drawn of a class
            that has fewer than twice as many left.
        has_test: whether there are test items elsewhere, so that none is drawn for testing.

    Returns:
        The sorted positions of the training items, and those of the held-out items.

    Raises:
        UserError: the seed is not a whole number >= 0.
    """
    generator = np.random.default_rng(as_whole_number("seed", seed, 0))
    train, evaluated = [], []
    for label in labels.unique():
        order = torch.from_numpy(generator.permutation((labels == label).nonzero()[:, 0].numpy()))
        num_test = 0 if has_test else _num_held_out(len(order), 4, fewest)
        test, rest = order[:num_test], order[num_test:]
        num_validation = _num_held_out(len(rest), 5, fewest)
        validation, remaining = rest[:num_validation], rest[num_validation:]
        train.append(remaining)
        evaluated.append(test if held_out == "test" else validation)
    return torch.cat(train).sort().values, torch.cat(evaluated).sort().values


def _num_held_out(num_items: int, divisor: int, fewest: int) -> int:
    return max(num_items // divisor, fewest) if num_items >= 2 * fewest else 0
