"""Which items of a data set are trained on, and which are held out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.errors import UserError

HeldOut = Literal["test", "validation"]


def check_held_out(held_out: str) -> None:
    """Raises `UserError` for anything but "test" and "validation"."""
    if held_out not in ("test", "validation"):
        raise UserError(f"held_out must be 'test' or 'validation', got '{held_out}'")


def partition(labels: Tensor, held_out: HeldOut, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of training items and of held-out items, drawn class by class: test a quarter, validation a fifth of the rest.

    Args:
        labels: [N].
        held_out: which of the two parts is returned as held out; the other is in neither result.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    train, held = [], []
    for label in labels.unique():
        order = torch.from_numpy(generator.permutation((labels == label).nonzero()[:, 0].numpy()))
        test, rest = order.split([len(order) // 4, len(order) - len(order) // 4])
        validation, remaining = rest.split([len(rest) // 5, len(rest) - len(rest) // 5])
        train.append(remaining)
        held.append(test if held_out == "test" else validation)
    return torch.cat(train).sort().values, torch.cat(held).sort().values
