"""Evaluation where the held-out items of some splits are gone: the others are evaluated, and these are NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mas_embed.data import Split
from mas_embed.evaluation.base import Evaluation, Evaluator


def begin_present(evaluator: Evaluator, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
    """`evaluator.begin_split` with the splits that have held-out items, see `evaluate_present`."""
    present, position = _present(evaluator, splits, split_index)
    evaluator.begin_split(model, present, position)


def evaluate_present(evaluator: Evaluator, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
    """`evaluator.evaluate` with the splits that have held-out items; the scores of the others are NaN.

    Neither are the queries of the others asked, nor is their gallery searched. An evaluator with an attribute `accepts_missing`
    that is true is given all splits.
    """
    present, position = _present(evaluator, splits, split_index)
    measured = evaluator.evaluate(model, present, position)
    if len(present) == len(splits):
        return measured
    is_present = [len(split.query) > 0 for split in splits]
    scores = {}
    for name, values in measured.scores.items():
        remaining = iter(values)
        scores[name] = [next(remaining) if one else math.nan for one in is_present]
    return replace(measured, scores=scores)


def _present(evaluator: Evaluator, splits: Sequence[Split], split_index: int) -> tuple[Sequence[Split], int]:
    """The splits that are evaluated, and the position of a split among them."""
    if getattr(evaluator, "accepts_missing", False) or all(len(split.query) for split in splits):
        return splits, split_index
    present = [split for split in splits if len(split.query)]
    return present, sum(len(split.query) > 0 for split in splits[: split_index + 1]) - 1
