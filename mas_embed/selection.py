"""The options of a method, chosen fairly: on held-out queries and seeds that no reported figure uses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mas_embed.errors import RunError, UserError

Options = dict[str, Any]


def candidates_of(grid: Mapping[str, Sequence[Any]]) -> list[Options]:
    """Every combination of the values of several options, the last option changing fastest.

    Example:
        >>> candidates_of({"strength": [1, 10], "decay": [0.5]})
        [{'strength': 1, 'decay': 0.5}, {'strength': 10, 'decay': 0.5}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def try_candidate(candidate: Options, seeds: Sequence[int], score: Callable[[Options, int], float]) -> dict[str, Any]:
    """Scores one candidate with every seed; a training that fails is written down and ends the candidate, nothing else.

    Args:
        candidate: values of the options that are chosen.
        seeds: of the trainings.
        score: `(candidate, seed) -> higher is better`; may raise `RunError` or `UserError`.

    Returns:
        As JSON has it: "options", "seeds", "values" (of the seeds that ended), "mean" (None if one failed), "error" (None, or
        what the failure said) and "seconds".
    """
    start, values, error = time.perf_counter(), [], None
    for seed in seeds:
        try:
            values.append(score(candidate, seed))
        except (RunError, UserError) as failure:
            error = f"seed {seed}: {failure}"
            break
    return {
        "options": candidate,
        "seeds": list(seeds),
        "values": values,
        "mean": sum(values) / len(values) if error is None else None,
        "error": error,
        "seconds": round(time.perf_counter() - start, 3),
    }


def best_of(tried: Sequence[Mapping[str, Any]], where: str) -> Options:
    """The options of the candidate with the highest mean, the first of equals.

    Raises:
        RunError: none has a mean.
    """
    scored = [candidate for candidate in tried if candidate["mean"] is not None]
    if not scored:
        reasons = "; ".join(dict.fromkeys(candidate["error"] for candidate in tried))
        raise RunError(f"{where}: every candidate failed: {reasons}")
    return dict(max(scored, key=lambda candidate: float(candidate["mean"]))["options"])
