"""The options of a method, chosen on held-out queries and with seeds that no reported figure uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mas_embed.config import Config, MethodSection, with_candidate
from mas_embed.errors import RunError, reason_of
from mas_embed.evaluation import Candidate, Selection


@dataclass(frozen=True)
class Trial:
    """How the training of a candidate with one seed has ended.

    Attributes:
        value: the score; None if the training failed.
        error: why it failed; None if it did not.
        seconds: wall time.
    """

    value: float | None
    error: str | None
    seconds: float


def try_candidate(
    options: Mapping[str, Any], seeds: Sequence[int], score: Callable[[Mapping[str, Any], int], float]
) -> Candidate:
    """Scores one candidate with every seed; a training that fails is written down and ends the candidate, nothing else.

    Args:
        options: values of the options that are chosen.
        seeds: of the trainings.
        score: `(options, seed) -> higher is better`.
    """
    trials: list[Trial] = []
    for seed in seeds:
        start, value, error = time.perf_counter(), None, None
        try:
            value = finite_score(score(options, seed))
        except Exception as failure:  # such as a number that overflows: the other candidates can still be tried
            error = reason_of(failure)
        trials.append(Trial(value, error, time.perf_counter() - start))
        if error is not None:
            break
    return as_candidate(options, seeds, trials)


def finite_score(value: float) -> float:
    """The value; raises `RunError` if it is not finite."""
    if not math.isfinite(value):
        raise RunError(f"the score is {value}")
    return value


def as_candidate(options: Mapping[str, Any], seeds: Sequence[int], trials: Sequence[Trial]) -> Candidate:
    """What is written down of a candidate; nothing counts after the first training that has failed.

    Args:
        options: values of the options that are chosen.
        seeds: of the trainings.
        trials: with the seeds, in their order, all of them or up to the first that has failed.
    """
    num_values = next((index for index, trial in enumerate(trials) if trial.error is not None), len(trials))
    values = [trial.value for trial in trials[:num_values] if trial.value is not None]
    has_failed = num_values < len(trials)
    return Candidate(
        options=dict(options),
        seeds=list(seeds),
        values=values,
        mean=None if has_failed else sum(values) / len(values),
        error=f"seed {seeds[num_values]}: {trials[num_values].error}" if has_failed else None,
        seconds=round(sum(trial.seconds for trial in trials), 3),
    )


def select_options(config: Config, method: MethodSection, selection: Selection) -> MethodSection:
    """The method with the options of its best candidate, which are also noted in the selection.

    Raises:
        RunError: every candidate has failed.
    """
    assert method.select is not None
    best = best_candidate(selection.candidates, f"{method.title}: selection").options
    selection.by, selection.on, selection.chosen = method.select.by, method.select.on, best
    return with_candidate(config, method, best)


def best_candidate(tried: Sequence[Candidate], where: str) -> Candidate:
    """The candidate with the highest mean, the first of equals.

    Raises:
        RunError: none has a mean.
    """
    means = [candidate.mean for candidate in tried if candidate.mean is not None]
    if not means:
        reasons = "; ".join(dict.fromkeys(str(candidate.error) for candidate in tried))
        raise RunError(f"{where}: every candidate failed: {reasons}")
    return next(candidate for candidate in tried if candidate.mean == max(means))
