"""What methods cannot be made of, or work with, told before they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mas_embed.errors import UserError


def check_strength(strength: float) -> None:
    """Raises `UserError` for a strength that is not a finite number >= 0."""
    if not (math.isfinite(strength) and strength >= 0):
        raise UserError(f"strength must be a finite number >= 0, got {strength}")


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raises `UserError` for a value that is not in [low, high]."""
    if not low <= value <= high:
        raise UserError(f"{option} must be from {low:g} to {high:g}, got {value}")


def check_share(share: float) -> None:
    """Raises `UserError` for a share of drawn or stored samples that is not in [0, 1)."""
    if not 0 <= share < 1:
        raise UserError(f"share must be from 0 to below 1, got {share}")


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises `UserError` for a value that is none of the choices."""
    if value not in choices:
        *first, last = [f"'{choice}'" for choice in choices]
        raise UserError(f"{option} must be {', '.join(first)} or {last}, got {value!r}")


def inputs_and_labels(batch: Any, purpose: str) -> tuple[Any, Tensor]:
    """The inputs and labels of a batch `(inputs, labels)`.

    Args:
        batch: as `consolidate` is given it.
        purpose: what the labels are wanted for, to say so if there are none: "EWC takes the gradient of the loss".

    Raises:
        UserError: the batch is no such pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise UserError(f"{purpose} and needs batches of (inputs, labels), got one that is a {type(batch).__name__}")
