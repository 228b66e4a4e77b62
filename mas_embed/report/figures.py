"""Pictures of the scores: every split after every split, scores over time, and forgetting against learning."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mas_embed.evaluation import Results
from mas_embed.report.drawing import (
    HEAT,
    INK,
    LINE,
    MUTED,
    PAPER,
    WRONG,
    Style,
    drawn,
    name_ticks,
    plain_axis,
    score_limits,
    styles_of,
)
from mas_embed.report.tables import metric_name

MOST_PANELS = 5  # in a row
MOST_SHADED = 7  # methods, up to which the deviation is drawn around a line
LONGEST_TICK = 14  # characters


def scores_figure(results: Results) -> Figure:
    """One heat map of R[i, j] for each method above one panel for each split, its score over time; means over the seeds.

    A shade around a line is one standard deviation over the seeds. A method with a single row (joint training) is a
    dashed line. Scores that were not measured are left out; those of splits that are not learned yet have no colour.
    """
    methods, metric = results.methods, drawn(metric_name(results.primary_metric))
    num_splits = len(results.splits)
    num_columns = min(len(methods), MOST_PANELS)
    num_rows = math.ceil(len(methods) / num_columns)
    size = (max(3.1 * num_columns, 2.4 * num_splits, 6), 3.7 * num_rows + 2.75)
    figure = Figure(figsize=size, layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[1.35 * num_rows, 1])
    upper, lower = rows
    upper.suptitle(f"{metric} on split j (columns) after training through split i (rows)", fontsize=11)
    lower.suptitle(f"{metric} of each split over time", fontsize=11)
    axes = list(upper.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes[len(methods) :]:
        axis.set_visible(False)
    limits = limits_of(results)
    for axis, method in zip(axes, methods, strict=False):
        draw_matrix(axis, results, method, limits)
        axis.set_title(drawn(method))
    lowest = max(axis.get_ylim()[0] for axis in axes[: len(methods)])
    for axis in axes[: len(methods)]:
        axis.set_ylim(bottom=lowest)  # one size of cells, also in a matrix of a single row
    panels = lower.subplots(1, num_splits, squeeze=False, sharey=True)[0]
    for split_index, axis in enumerate(panels):
        draw_split(axis, results, split_index, limits)
    panels[0].set_ylabel(metric)
    handles = panels[0].get_legend_handles_labels()
    lower.legend(*handles, loc="outside lower center", ncols=2 * MOST_PANELS, frameon=False, fontsize=8)
    return figure


def limits_of(results: Results) -> tuple[float, float]:
    """The scale of all pictures of the primary metric: from about the lowest measured score to the highest."""
    scores = np.concatenate([results.matrices(method).ravel() for method in results.methods])
    measured = scores[np.isfinite(scores)]
    return score_limits(float(measured.min()), float(measured.max())) if len(measured) else (0.0, 1.0)


def styles_of_results(results: Results) -> dict[str, Style]:
    """The style of every method of a run."""
    return styles_of(results.methods, references_of(results))


def references_of(results: Results) -> list[str]:
    """The methods that are trained on everything at once, with a single row of scores."""
    num_splits = len(results.splits)
    return [method for method in results.methods if num_splits > 1 and results.matrices(method).shape[1] == 1]


def draw_matrix(axis: Axes, results: Results, method: str, limits: tuple[float, float]) -> None:
    """The mean score on every split (columns) after every split (rows), and below it the change of each since it was learned.

    The darker, the higher on the scale; scores of splits that are not learned yet are hatched, without a colour.
    """
    scores = _mean_of_measured(results.matrices(method))
    is_sequence = len(scores) == len(results.splits)
    font_size = 11 if cell_size(len(results.splits)) > 30 else 9
    for (row, column), value in np.ndenumerate(scores):
        if not np.isnan(value):
            is_learned = not is_sequence or column <= row
            _draw_cell(axis, row, column, value, limits, is_learned=is_learned, font_size=font_size)
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    row_names = list(names) if is_sequence else ["all at once"]
    bottom = len(scores) - 0.5
    if is_sequence and len(scores) > 1:
        _draw_changes(axis, scores, y=len(scores) + 0.15, font_size=font_size - 1)
        bottom = len(scores) + 0.65
    axis.set(xlim=(-0.5, len(names) - 0.5), ylim=(bottom, -0.5), aspect="auto")
    plain_axis(axis)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_yticks(
        [*range(len(row_names)), *([len(scores) + 0.15] if bottom > len(scores) else [])],
        [*row_names, *(["change"] if bottom > len(scores) else [])],
    )
    axis.xaxis.tick_top()  # first, because the labels above the axis are others than those below it
    name_ticks(axis, names, width=cell_size(len(names)) * len(names))
    for label in axis.get_xticklabels():
        if label.get_rotation():
            label.set(ha="left")


def cell_size(num_splits: int) -> int:
    """Of the cells of a matrix, in pixels of the page."""
    return 43 if num_splits <= 6 else 34 if num_splits <= 10 else 26


def draw_split(
    axis: Axes, results: Results, split_index: int, limits: tuple[float, float], *, width: float = 170
) -> None:
    """The score of one split after every split, a line for each method with a shade of one deviation over the seeds.

    Args:
        axis: to draw on.
        results: of a run.
        split_index: of the split.
        limits: of the scores.
        width: of the axis in pixels, by which the names of splits stand upright or at an angle.
    """
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    positions = np.arange(len(names))
    styles = styles_of_results(results)
    for method, style in styles.items():
        column = results.matrices(method)[:, :, split_index]
        mean, deviation = _mean_of_measured(column), _deviation(column)
        if len(mean) == len(names):
            draw_line(axis, mean, style, label=drawn(method))
            if len(styles) > MOST_SHADED:
                continue
            shade = axis.fill_between(
                positions, mean - deviation, mean + deviation, color=style.color, alpha=0.16, linewidth=0
            )
            shade.set_gid(style.group)
        elif np.isfinite(mean[0]):
            line = axis.axhline(mean[0], color=style.color, linestyle=style.line, linewidth=1.4, label=drawn(method))
            line.set_gid(style.group)
    plain_axis(axis)
    axis.axvspan(-0.35, split_index, color=LINE, alpha=0.35, linewidth=0, zorder=0)
    name_ticks(axis, names, width=width)
    axis.set(xlim=(-0.35, len(names) - 0.65), ylim=limits, title=f"split {names[split_index]}")


def draw_line(axis: Axes, values: NDArray[np.float64], style: Style, **options: Any) -> None:
    """A line of a method through the values that are not NaN."""
    positions = np.flatnonzero(~np.isnan(values))
    options = {"linestyle": style.line, "linewidth": 1.8, "marker": style.marker, "markersize": 4.5, **options}
    (line,) = axis.plot(positions, values[positions], color=style.color, **options)
    line.set_gid(style.group)


def _draw_cell(
    axis: Axes, row: int, column: int, value: float, limits: tuple[float, float], *, is_learned: bool, font_size: int
) -> None:
    low, high = limits
    share = float(np.clip((value - low) / (high - low), 0, 1))
    box = partial(Rectangle, (column - 0.47, row - 0.47), 0.94, 0.94)
    if is_learned:
        axis.add_patch(box(facecolor=HEAT, alpha=0.06 + 0.94 * share, linewidth=0))
    else:
        axis.add_patch(box(facecolor="none", edgecolor=LINE, linewidth=0.7, linestyle=(0, (2, 2))))
    if row == column and is_learned:
        axis.add_patch(box(facecolor="none", edgecolor=INK, linewidth=1.2))
    color = (PAPER if share > 0.66 else INK) if is_learned else MUTED
    axis.text(column, row, short_score(value), ha="center", va="center_baseline", fontsize=font_size, color=color)


def _draw_changes(axis: Axes, scores: NDArray[np.float64], *, y: float, font_size: int) -> None:
    """Below every column but the last how the score changed since its split was learned."""
    for column in range(len(scores) - 1):
        change = scores[-1, column] - scores[column, column]
        if not np.isnan(change):
            sign, color = ("▼", WRONG) if change < -0.005 else ("▲" if change > 0.005 else "", MUTED)
            text = f"{sign}{short_score(abs(change))}"
            axis.text(column, y, text, ha="center", va="center_baseline", fontsize=font_size, color=color)


def short_score(value: float) -> str:
    """A score in two digits, without the zero before its point.

    >>> short_score(0.435), short_score(-0.5), short_score(1), short_score(12.3)
    ('.43', '-.50', '1.0', '12.3')
    """
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def _mean_of_measured(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the first axis of the values that are not NaN; NaN where there is none."""
    counts = np.isfinite(values).sum(0)
    sums = np.where(np.isfinite(values), values, 0).sum(0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _deviation(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sample standard deviation over the first axis of the values that are not NaN; 0 of fewer than two."""
    counts = np.isfinite(values).sum(0)
    squares = np.where(np.isfinite(values), (values - _mean_of_measured(values)) ** 2, 0).sum(0)
    return np.sqrt(squares / np.maximum(counts - 1, 1))
