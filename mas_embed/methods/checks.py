"""Checks of the options of methods and of the batches that they are given."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_number, shown


def check_strength(strength: float) -> None:
    """Raises `UserError` unless the strength is a finite number >= 0."""
    is_number = isinstance(strength, Real) and not isinstance(strength, bool)
    if not (is_number and 0 <= strength < math.inf):
        raise UserError(f"strength must be a finite number >= 0, got {shown(strength)}")


def check_share(share: float) -> None:
    """Raises `UserError` unless the share of rehearsed items in a batch is in [0, 1)."""
    if not 0 <= as_number("share", share) < 1:
        raise UserError(f"share must be from 0 to below 1, got {share}")


def inputs_and_labels(batch: Any, purpose: str) -> tuple[Any, Tensor]:
    """The inputs and the labels of a batch.

    Args:
        batch: a batch that was passed to `consolidate`.
        purpose: the first half of the error message, which says why labels are needed: "EWC takes the gradient of the loss".

    Raises:
        UserError: the batch is not a pair `(inputs, labels)`.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise UserError(f"{purpose} and needs batches of (inputs, labels), got one that is a {type(batch).__name__}")
