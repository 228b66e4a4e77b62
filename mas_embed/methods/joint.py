"""Joint training on all splits at once, the upper reference."""

from __future__ import annotations

from mas_embed.methods.base import METHODS, Method


@METHODS.register("joint")
class Joint(Method):
    """Trains on one split that holds the items of all splits, and therefore has nothing to protect.

    An experiment joins the splits by itself. In Python, pass the joined split:
    `train_sequence(model, [join_splits(splits)], evaluate_on=splits, method=Joint(model), ...)`.
    """

    joins_splits = True
