"""Fewer evaluations, for sequences of many splits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mas_embed.data import Split
from mas_embed.evaluation.base import (
    BEFORE_FIRST,
    Evaluation,
    Evaluator,
    check_evaluable,
    observations_of,
    without_details,
)
from mas_embed.evaluation.present import begin_present, evaluate_present
from mas_embed.evaluation.recording import Observations
from mas_embed.runtime.checks import as_whole_number


class SparseEvaluator:
    """Evaluates only after some splits, or only the splits learned so far; what was not measured is NaN.

    With S splits, evaluating all of them after each costs S^2 passes over a split's held-out items.

    Args:
        evaluator: the evaluator that measures.
        every: evaluate after every n-th split, and after the last; 1 for after each.
        only_learned: evaluate the splits learned so far and no others: neither their queries are asked, nor is their
            gallery searched. The gallery then grows from split to split, and with it the number of items that a query can
            be confused with. Before the first split all are evaluated once.

    Raises:
        UserError: `every` is below 1.
    """

    accepts_missing = True  # see `evaluate_present`

    def __init__(self, evaluator: Evaluator, *, every: int = 1, only_learned: bool = False) -> None:
        every = as_whole_number("every", every, 1)
        self.evaluator, self.every, self.only_learned = evaluator, every, only_learned
        self._metrics: tuple[str, ...] = ()
        self._has_begun = False  # whether a split was begun since the last evaluation

    def check(self, splits: Sequence[Split]) -> Collection[str] | None:
        """The names of the metrics; refuses splits that the evaluator refuses, alone or as the first of a sequence."""
        for num_evaluated in range(1, len(splits)) if self.only_learned else ():
            check_evaluable(self.evaluator, splits[:num_evaluated])
        return check_evaluable(self.evaluator, splits)

    def without_details(self) -> SparseEvaluator:
        """The same, around an evaluator without details."""
        return SparseEvaluator(without_details(self.evaluator), every=self.every, only_learned=self.only_learned)

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Passes the first split since the last evaluation on."""
        if not self._has_begun:
            begin_present(self.evaluator, model, splits[: self._num_evaluated(splits, split_index)], split_index)
        self._has_begun = True

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """The evaluation, with NaN for every split that is not evaluated; all NaN after a split that is passed over."""
        is_due = split_index == BEFORE_FIRST or (split_index + 1) % self.every == 0 or split_index == len(splits) - 1
        if not is_due:
            unmeasured = [math.nan] * len(splits)
            return Evaluation(
                {name: list(unmeasured) for name in self._metrics}, dict.fromkeys(self._metrics, math.nan)
            )
        num_evaluated = self._num_evaluated(splits, split_index)
        measured = evaluate_present(self.evaluator, model, splits[:num_evaluated], split_index)
        self._metrics, self._has_begun = tuple(measured.scores), False
        missing = [math.nan] * (len(splits) - num_evaluated)
        return replace(measured, scores={name: [*values, *missing] for name, values in measured.scores.items()})

    def observations(self) -> Observations | None:
        """What the evaluator that measures has recorded."""
        return observations_of(self.evaluator)

    def state_dict(self) -> Mapping[str, Any]:
        """The state of the evaluator that measures, the metrics, and whether a split was begun since the last evaluation."""
        metrics = {name: index for index, name in enumerate(self._metrics)}
        return {"evaluator": self.evaluator.state_dict(), "metrics": metrics, "has_begun": self._has_begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.evaluator.load_state_dict(state["evaluator"])
        self._metrics, self._has_begun = tuple(state["metrics"]), bool(state["has_begun"])

    def _num_evaluated(self, splits: Sequence[Split], split_index: int) -> int:
        is_limited = self.only_learned and split_index != BEFORE_FIRST
        return split_index + 1 if is_limited else len(splits)
