"""Evaluation where the held-out items of some splits are gone: the others are evaluated, and these are NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace

from torch import nn

from mas_embed.data import Split
from mas_embed.evaluation.base import Evaluation, Evaluator


def begin_present(evaluator: Evaluator, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
    """`evaluator.begin_split` with the splits that have held-out items, see `evaluate_present`."""
    present, position = _present(evaluator, splits, split_index)
    evaluator.begin_split(model, present, position)


def evaluate_present(evaluator: Evaluator, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
    """`evaluator.evaluate` with the splits that have held-out items; the scores of the others are NaN, also in the details.

    Neither are the queries of the others asked, nor is their gallery searched. An evaluator with an attribute `accepts_missing`
    that is true is given all splits.
    """
    present, position = _present(evaluator, splits, split_index)
    measured = evaluator.evaluate(model, present, position)
    if len(present) == len(splits):
        return measured
    is_present = [len(split.query) > 0 for split in splits]
    scores = {name: _with_missing(values, is_present) for name, values in measured.scores.items()}
    details = measured.details
    by_split = {
        field.name: {
            metric: _with_missing(values, is_present) for metric, values in getattr(details, field.name).items()
        }
        for field in (fields(details) if is_dataclass(details) else ())
        if _holds_scores(getattr(details, field.name))
    }
    return replace(measured, scores=scores, details=replace(details, **by_split) if by_split else details)


def _with_missing(values: Sequence[float], is_present: Sequence[bool]) -> list[float]:
    """Scores of the splits that are present, or of the first of these, with NaN at the places of the others."""
    remaining, completed = list(values), []
    for one in is_present:
        if one and not remaining:
            break
        completed.append(remaining.pop(0) if one else math.nan)
    return completed


def _holds_scores(value: object) -> bool:
    """Whether a field of the details holds scores of splits by metric."""
    return isinstance(value, Mapping) and all(isinstance(scores, list) for scores in value.values())


def _present(evaluator: Evaluator, splits: Sequence[Split], split_index: int) -> tuple[Sequence[Split], int]:
    """The splits that are evaluated, and the position of a split among them."""
    if getattr(evaluator, "accepts_missing", False) or all(len(split.query) for split in splits):
        return splits, split_index
    present = [split for split in splits if len(split.query)]
    return present, sum(len(split.query) > 0 for split in splits[: split_index + 1]) - 1
