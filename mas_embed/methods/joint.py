"""Joint training: all splits at once, the upper reference."""

from __future__ import annotations

from mas_embed.methods.base import METHODS, Method


@METHODS.register("joint")
class Joint(Method):
    """Trains on one split that holds the items of all; there is nothing to protect.

    In Python: `train_sequence(model, [join_splits(splits)], evaluate_on=splits, method=Joint(model), ...)`.
    """

    joins_splits = True
