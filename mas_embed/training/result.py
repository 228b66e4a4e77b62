"""What a sequence of splits did to a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mas_embed.errors import UserError, explained, unknown_name
from mas_embed.evaluation import MEASURES, Results, RunRecord, ScoreMatrix
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.json_text import json_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(repr=False)
class SequenceResult:
    """What a model knew after every split. Printing it gives a summary, `plot` a figure and `report` a page with all tables.

    Attributes:
        splits: the names of the splits that were evaluated, [S].
        scores: `ScoreMatrix` by metric: R[i, j] on split j after training through split i.
        initial: by metric the scores [S] of the untrained model.
        pooled: by metric one score over the items of all splits together, after the last.
        details: the evaluator's further findings after every split, as JSON; empty where it has none.
        num_steps: batches that were trained on.
        seconds: wall time of "training", "importance" (what the method does when a split ends) and "evaluation".
        method: the name of the method.
        seed: of the training.
        keeps: which data of earlier splits the method stores, see `Method.keeps`.
        num_bytes: the memory that the method needs in the end.
        missing: the names of the splits that were not evaluated in the end, because their data was gone.
    """

    splits: list[str]
    scores: dict[str, ScoreMatrix]
    initial: dict[str, list[float]]
    pooled: dict[str, float]
    details: list[dict[str, Any]]
    num_steps: int
    seconds: dict[str, float]
    method: str = "method"
    seed: int = 0
    keeps: str = "nothing"
    num_bytes: int = 0
    missing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The measures of every metric and the matrix of the first, as lines of text."""
        lines = [
            f"{len(self.splits)} splits, {self.num_steps} batches, "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        ]
        if self.missing:
            lines.append(f"not evaluated in the end, because their data is missing: {', '.join(self.missing)}")
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

    def plot(self, metric: str | None = None) -> Figure:
        """A Matplotlib figure with the score matrix as a heat map, and the score of each split over time.

        Args:
            metric: that is drawn; by default the first of `scores`.

        Raises:
            UserError: the result has no such metric, or no scores.
        """
        from mas_embed.report import scores_figure

        return scores_figure(self._as_results(metric, name=self.method))

    def report(self, path: str | Path, *, metric: str | None = None, name: str | None = None) -> None:
        """Writes an HTML page with the tables and figures of the run, which needs no other file.

        Args:
            path: of the page, such as "report.html"; a file of that name is replaced.
            metric: the metric that tables and figures show first; by default the first of `scores`.
            name: the title of the page; by default the name of the method.

        Raises:
            UserError: the result has no such metric, or no scores, or the file cannot be written.
            RunError: the disk is full.
        """
        from mas_embed.report import render

        results = self._as_results(metric, name=self.method if name is None else name)
        write_file(Path(path), render(results)["report.html"])

    def as_record(self, about: Mapping[str, Any] | None = None) -> RunRecord:
        """The record of the run in a `results.json`, with further fields of a `RunRecord` from `about`."""
        fields = {
            "method": self.method,
            "seed": self.seed,
            "keeps": self.keeps,
            "num_bytes": self.num_bytes,
            "missing": self.missing,
            "scores": {name: matrix.scores.tolist() for name, matrix in self.scores.items()},
            "initial": self.initial,
            "pooled": self.pooled,
            "measures": {name: _measures(matrix, self.initial[name]) for name, matrix in self.scores.items()},
            "num_averaged": next(iter(self.scores.values())).num_averaged,
            "details": self.details,
            "num_steps": self.num_steps,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        # By way of JSON, so that a record that was just made equals one that is read
        return RunRecord.model_validate(json.loads(json_text({**fields, **(about or {})})))

    def _as_results(self, metric: str | None, *, name: str) -> Results:
        """The results of an experiment with this run only."""
        if not self.scores:
            raise UserError("the result has no scores to show; train with an evaluator that returns some")
        if metric is not None and metric not in self.scores:
            raise unknown_name("metric", metric, self.scores)
        primary = next(iter(self.scores)) if metric is None else metric
        with explained("the result"):
            return Results(name=name, splits=self.splits, primary_metric=primary, runs=[self.as_record()])


def _measures(matrix: ScoreMatrix, initial: list[float]) -> dict[str, float]:
    measures = {name: getattr(matrix, name) for name in MEASURES}
    return {**measures, "forward_transfer": matrix.forward_transfer(initial)}


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
