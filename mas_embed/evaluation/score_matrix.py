"""The scores of every split after every split, and the measures of forgetting that follow from them. S splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mas_embed.errors import UserError, reason_of

MEASURES = ("final_average", "forgetting", "backward_transfer", "learning")


class ScoreMatrix:
    """`R[i, j]`: the score on split j after training through split i; NaN where it was not measured.

    Every measure is a mean over splits, of those whose scores were measured: `num_averaged` tells how many. A measure is NaN
    where there are none: measures over the earlier splits with S = 1, and measures that need a score after each split for the
    single row [1, S] that joint training gives.

    Args:
        scores: [S, S], row i after split i; or [1, S], after training on everything at once. Higher is better.

    Raises:
        UserError: another shape, or an infinite value.

    Examples:
        >>> scores = ScoreMatrix([[0.9, 0.3], [0.6, 0.8]])
        >>> print(f"{scores.final_average:.2f} {scores.forgetting:.2f} {scores.backward_transfer:.2f}")
        0.70 0.30 -0.30
    """

    def __init__(self, scores: ArrayLike) -> None:
        try:
            self.scores: NDArray[np.float64] = np.array(scores, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"scores must be an array of numbers: {reason_of(error)}") from None
        shape = self.scores.shape
        if self.scores.ndim != 2 or 0 in shape or shape[0] not in (1, shape[1]):
            raise UserError(f"scores must have shape [S, S] (or [1, S] for joint training), got {list(shape)}")
        if np.isinf(self.scores).any():
            raise UserError("scores must be finite, or NaN where they were not measured, got infinite values")

    def __getitem__(self, index: tuple[int, int]) -> float:
        return float(self.scores[index])

    def __repr__(self) -> str:
        return f"ScoreMatrix({np.array2string(self.scores, precision=3, suppress_small=True)})"

    @property
    def is_sequential(self) -> bool:
        """Whether there is a row for every split."""
        return self.scores.shape[0] == self.scores.shape[1]

    @property
    def final_average(self) -> float:
        """`mean_j R[S-1, j]`: the score over all splits in the end."""
        return mean_of_measured(self._final_scores())

    @property
    def learning(self) -> float:
        """`mean_j R[j, j]`: the score on a split when it has just been learned."""
        return mean_of_measured(self._learned_scores())

    @property
    def forgetting(self) -> float:
        """`mean_{j<S-1} (max_{j<=i<S-1} R[i, j] - R[S-1, j])`: the fall from a split's best (Chaudhry et al., 2018)."""
        return mean_of_measured(self._falls())

    @property
    def backward_transfer(self) -> float:
        """`mean_{j<S-1} (R[S-1, j] - R[j, j])`: negative where later splits harm earlier ones (Lopez-Paz & Ranzato, 2017)."""
        return mean_of_measured(self._changes())

    @property
    def num_averaged(self) -> dict[str, int]:
        """By measure over how many splits its mean is taken; 0 where the measure is NaN."""
        terms = map(np.asarray, (self._final_scores(), self._falls(), self._changes(), self._learned_scores()))
        return {name: int(np.isfinite(values).sum()) for name, values in zip(MEASURES, terms, strict=True)}

    def forward_transfer(self, initial: ArrayLike) -> float:
        """`mean_{j>0} (R[j-1, j] - initial[j])`, `initial` [S] being the untrained model's scores (Lopez-Paz & Ranzato, 2017)."""
        baseline = self._per_split(initial, "initial")
        return mean_of_measured([self.scores[j - 1, j] - baseline[j] for j in range(1, len(self.scores))])

    def intransigence(self, joint: ArrayLike) -> float:
        """`mean_j (joint[j] - R[j, j])`, with `joint` [S] the scores of joint training (Chaudhry et al., 2018)."""
        if not self.is_sequential:
            return float("nan")
        return mean_of_measured(self._per_split(joint, "joint") - np.diag(self.scores))

    def _final_scores(self) -> NDArray[np.float64]:
        return self.scores[-1]

    def _learned_scores(self) -> NDArray[np.float64]:
        return np.diag(self.scores) if self.is_sequential else np.empty(0)

    def _falls(self) -> list[float]:
        last = len(self.scores) - 1
        earlier = range(last) if self.is_sequential else range(0)
        return [_largest(self.scores[j:last, j]) - float(self.scores[last, j]) for j in earlier]

    def _changes(self) -> list[float]:
        last = len(self.scores) - 1
        return [float(self.scores[last, j] - self.scores[j, j]) for j in (range(last) if self.is_sequential else ())]

    def _per_split(self, values: ArrayLike, name: str) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.scores.shape[1],):
            raise UserError(
                f"{name} must have one score per split, shape [{self.scores.shape[1]}], got {list(array.shape)}"
            )
        return array


def _largest(values: NDArray[np.float64]) -> float:
    """The largest of the values that are not NaN; NaN if there is none."""
    measured = values[~np.isnan(values)]
    return float(measured.max()) if len(measured) else float("nan")


def mean_of_measured(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    measured = np.asarray(values, dtype=np.float64)
    measured = measured[~np.isnan(measured)]
    return float(measured.mean()) if len(measured) else float("nan")
