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


def partition(labels: Tensor, held_out: HeldOut, seed: int) -> tuple[Tensor, Tensor]:
    """The positions of the training items and of the held-out items of a data set.

    Of every class, a quarter of the items is drawn for testing, and a fifth of the others for validation. The remaining items
    are for training.

    Args:
        labels: [N].
        held_out: whether the test items or the validation items are returned as held out. The other ones are in neither
            result.
        seed: of the random draw.

    Returns:
        The sorted positions of the training items, and those of the held-out items.

    Raises:
        UserError: the seed is not a whole number >= 0.
    """
    generator = np.random.default_rng(as_whole_number("seed", seed, 0))
    train, evaluated = [], []
    for label in labels.unique():
        order = torch.from_numpy(generator.permutation((labels == label).nonzero()[:, 0].numpy()))
        test, rest = order.split([len(order) // 4, len(order) - len(order) // 4])
        validation, remaining = rest.split([len(rest) // 5, len(rest) - len(rest) // 5])
        train.append(remaining)
        evaluated.append(test if held_out == "test" else validation)
    return torch.cat(train).sort().values, torch.cat(evaluated).sort().values
