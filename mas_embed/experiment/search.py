"""The options of a method, chosen on held-out queries and with seeds that no reported figure uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mas_embed.errors import RunError, reason_of
from mas_embed.evaluation import Candidate


def try_candidate(
    options: Mapping[str, Any], seeds: Sequence[int], score: Callable[[Mapping[str, Any], int], float]
) -> Candidate:
    """Scores one candidate with every seed; a training that fails is written down and ends the candidate, nothing else.

    Args:
        options: values of the options that are chosen.
        seeds: of the trainings.
        score: `(options, seed) -> higher is better`.
    """
    start, values, error = time.perf_counter(), [], None
    for seed in seeds:
        try:
            value = score(options, seed)
            if not math.isfinite(value):
                raise RunError(f"the score is {value}")
            values.append(value)
        except Exception as failure:  # such as a number that overflows: the other candidates can still be tried
            error = f"seed {seed}: {reason_of(failure)}"
            break
    return Candidate(
        options=dict(options),
        seeds=list(seeds),
        values=values,
        mean=sum(values) / len(values) if error is None else None,
        error=error,
        seconds=round(time.perf_counter() - start, 3),
    )


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
