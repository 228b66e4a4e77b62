"""What a sequence of splits did to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mas_embed.evaluation import ScoreMatrix


@dataclass(repr=False)
class SequenceResult:
    """What a model knew after every split. Printing it gives a summary.

    Attributes:
        splits: the names of the splits that were evaluated, [S].
        scores: `ScoreMatrix` by metric: R[i, j] on split j after training through split i.
        initial: by metric the scores [S] of the untrained model.
        pooled: by metric one score over the items of all splits together, after the last.
        details: the evaluator's further findings after every split, as JSON; empty where it has none.
        num_steps: batches that were trained on.
        seconds: wall time of "training", "importance" (what the method does when a split ends) and "evaluation".
    """

    splits: list[str]
    scores: dict[str, ScoreMatrix]
    initial: dict[str, list[float]]
    pooled: dict[str, float]
    details: list[dict[str, Any]]
    num_steps: int
    seconds: dict[str, float]

    def summary(self) -> str:
        """The measures of every metric and the matrix of the first, as lines of text."""
        lines = [
            f"{len(self.splits)} splits, {self.num_steps} batches, "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        ]
        width = max((len(name) for name in self.scores), default=0)
        columns = ("final_average", "forgetting", "learning")
        lines += ["", "  ".join(["".ljust(width), *(name.replace("_", " ").rjust(13) for name in columns)])]
        for metric, matrix in self.scores.items():
            values = [_number(getattr(matrix, name)).rjust(13) for name in columns]
            lines.append("  ".join([metric.ljust(width), *values]))
        for metric, matrix in list(self.scores.items())[:1]:
            lines += ["", f"{metric} of each split (columns) after each split (rows)", ""]
            row_names = self.splits if matrix.is_sequential else ["all at once"]
            width = max(map(len, row_names))
            sizes = [max(len(name), 4) for name in self.splits]
            lines.append(
                "  ".join([" " * width, *(name.rjust(size) for name, size in zip(self.splits, sizes, strict=True))])
            )
            for name, row in zip(row_names, matrix.scores, strict=True):
                cells = [_number(value).rjust(size) for value, size in zip(row, sizes, strict=True)]
                lines.append("  ".join([name.ljust(width), *cells]))
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return self.summary()


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
