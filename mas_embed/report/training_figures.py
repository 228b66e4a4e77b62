"""Pictures of the trainings: losses, the share of the penalty, and seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mas_embed.evaluation import Results
from mas_embed.report.drawing import COLORS, HEAT, INK, LINE, Margins, Style, drawn, panel, plain_axis, room_for
from mas_embed.report.run_files import LogLine, TrainingLog

PARTS = ("training", "importance", "evaluation")


def loss_of(line: LogLine) -> float:
    """The loss of an epoch, without penalties."""
    return float("nan") if line.loss is None else line.loss


def share_of_penalty(line: LogLine) -> float:
    """The penalty's share of loss and penalty together, at the end of an epoch."""
    if line.loss is None or line.penalty is None or line.loss + line.penalty <= 0:
        return float("nan")
    return line.penalty / (line.loss + line.penalty)


def draw_epochs(axis: Axes, logs: Sequence[TrainingLog], style: Style, value_of: Callable[[LogLine], float]) -> None:
    """A value of every epoch of every training of a method, a thin line for each and a thick one for their mean.

    Vertical lines are between the splits.
    """
    series = [np.array([value_of(line) for line in log.epochs]) for log in logs]
    for values in series:
        if len(series) > 1:
            axis.plot(np.arange(len(values)), values, color=style.color, linewidth=0.8, alpha=0.35)
    longest = max(map(len, series))
    padded = np.full((len(series), longest), np.nan)
    for row, values in zip(padded, series, strict=True):
        row[: len(values)] = values
    counts = np.isfinite(padded).sum(0)
    mean = np.where(counts > 0, np.where(np.isfinite(padded), padded, 0).sum(0) / np.maximum(counts, 1), np.nan)
    marker = style.marker if longest == 1 else None
    axis.plot(np.arange(longest), mean, color=style.color, linewidth=1.8, marker=marker)
    starts = _starts_of_splits(max(logs, key=lambda log: len(log.epochs)))
    for position in starts[1:]:
        axis.axvline(position - 0.5, color=LINE, linewidth=0.8)
    plain_axis(axis)
    axis.set_xticks([])
    axis.set_xlabel("epochs, split by split")
    axis.set_ylim(bottom=0)


def seconds_figure(results: Results, *, width: float = 620) -> Figure:
    """A bar for each method: seconds of a run for training, importance and evaluation, mean over the seeds."""
    names = [drawn(name, 22) for name in results.methods]
    figure, axis = panel(width, 26 * len(names) + 34, Margins(room_for(names), 28, 46, 4))
    lengths = {
        part: np.array(
            [np.mean([run.seconds.get(part, 0.0) for run in results.runs_of(method)]) for method in results.methods]
        )
        for part in PARTS
    }
    left = np.zeros(len(results.methods))
    for part, color in zip(PARTS, (HEAT, COLORS[5], LINE), strict=True):
        axis.barh(range(len(left)), lengths[part], left=left, height=0.55, color=color, label=part)
        left = left + lengths[part]
    for row, total in enumerate(left):
        axis.text(
            total, row, f" {total:,.0f}" if total >= 10 else f" {total:.1f}", va="center_baseline", size=11, color=INK
        )
    plain_axis(axis)
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_xticks([])
    axis.set_yticks(range(len(left)), names)
    axis.tick_params(axis="y", labelcolor=INK, labelsize=12)
    axis.set(ylim=(len(left) - 0.4, -0.6), xlim=(0, max(left.max() * 1.12, 1e-9)))
    figure.legend(loc="lower left", ncols=3, frameon=False, fontsize=10, labelcolor=INK, handlelength=1)
    return figure


def _starts_of_splits(log: TrainingLog) -> list[int]:
    indexes = [line.split_index for line in log.epochs]
    return [position for position, index in enumerate(indexes) if position == 0 or index != indexes[position - 1]]
