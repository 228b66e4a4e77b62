"""Pictures of a run: what was known of every split, after every split."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mas_embed.evaluation import Results
from mas_embed.report.tables import metric_name, so_far
from mas_embed.runtime.text import printable, shortened

# Okabe and Ito's colours, which people who see colours differently can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")  # where methods are more than colours
MOST_PANELS = 5  # in a row
LONGEST_NAME = 32  # characters
DOTS_PER_INCH = 130
MOST_DOTS = 30_000  # of a side of a picture; Matplotlib draws fewer than 2**16


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file; characters that the font does not have are drawn as boxes, without a warning."""
    picture = io.BytesIO()
    resolution = min(DOTS_PER_INCH, MOST_DOTS / max(figure.get_size_inches()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(picture, format="png", dpi=resolution)
    return picture.getvalue()


def drawn(name: str) -> str:
    r"""A name as Matplotlib draws it unchanged: shortened, without formulas, and not left out of legends for a "_" at its start.

    >>> drawn(r"$\frac$"), drawn("_hidden")
    ('\\$\\frac\\$', ' _hidden')
    """
    text = shortened(printable(name), LONGEST_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") or not text else text


def scores_figure(results: Results) -> Figure:
    """One heat map of R[i, j] for each method above one panel for each split, its score over time; means over the seeds.

    A shade around a line is one standard deviation over the seeds. A method with a single row (joint training) is a
    dashed line. Scores that were not measured are left out.
    """
    methods, metric = results.methods, drawn(metric_name(results.primary_metric))
    split_names = list(map(drawn, results.splits))
    num_splits = len(results.splits)
    num_columns = min(len(methods), MOST_PANELS)
    num_rows = math.ceil(len(methods) / num_columns)
    size = (max(3.1 * num_columns, 2.4 * num_splits, 6), 3.55 * num_rows + 2.65)
    figure = Figure(figsize=size, layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[1.35 * num_rows, 1])
    upper, lower = rows
    upper.suptitle(f"{metric} on split j after training through split i", fontsize=11)
    lower.suptitle(f"{metric} of each split over time", fontsize=11)
    axes = list(upper.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes[len(methods) :]:
        axis.set_visible(False)
    matrices = {method: results.matrices(method) for method in methods}
    for axis, method in zip(axes, methods, strict=False):
        image = _draw_matrix(axis, matrices[method].mean(0), split_names, drawn(method))
    upper.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    panels = lower.subplots(1, num_splits, squeeze=False, sharey=True)[0]
    for split_index, axis in enumerate(panels):
        _draw_split(axis, split_index, matrices, split_names)
    panels[0].set_ylabel(metric)
    handles = panels[0].get_legend_handles_labels()
    lower.legend(*handles, loc="outside lower center", ncols=2 * MOST_PANELS, frameon=False, fontsize=8)
    return figure


def stale_gallery_figure(results: Results) -> Figure:
    """One panel for each method that was trained in splits: the mean score over all splits learned so far, after each of them.

    A solid line with the gallery embedded again after every split (fresh), a dashed one with a gallery that never is (stale);
    means over the seeds.
    """
    metric, splits = results.index_metric, list(map(drawn, results.splits))
    runs_by_method = {
        method: [run for run in results.runs_of(method) if run.stale_gallery_matrix(metric) is not None]
        for method in results.methods
    }
    runs_by_method = {method: runs for method, runs in runs_by_method.items() if runs}
    num_columns = min(len(runs_by_method), MOST_PANELS)
    num_rows = math.ceil(len(runs_by_method) / num_columns)
    figure = Figure(figsize=(max(2.6 * num_columns, 6), 2.3 * num_rows + 0.6), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for axis in panels[len(runs_by_method) :]:
        axis.set_visible(False)
    for color, axis, (method, runs) in zip(cycle(COLORS), panels, runs_by_method.items(), strict=False):
        for style, label, stale in (("-", "fresh gallery", False), ("--", "stale gallery", True)):
            mean = np.mean([so_far(run, metric, stale=stale) for run in runs], axis=0)
            _plot_measured(axis, mean, style, color=color, label=label)
        axis.set_title(drawn(method), fontsize=10, fontweight="bold")
        axis.set_xticks(range(len(splits)), splits, fontsize=8)
        axis.set_xlabel("after training", fontsize=8)
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[::num_columns]:
        axis.set_ylabel(f"{drawn(metric_name(metric))} of splits so far", fontsize=9)
    figure.suptitle("A fresh gallery, embedded again after every split, and a stale one, which never is", fontsize=11)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_matrix(axis: Axes, scores: NDArray[np.float64], splits: list[str], title: str) -> Any:
    image = axis.imshow(scores, vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(scores):
        if not np.isnan(value):
            color = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    is_sequence = len(scores) == len(splits)
    row_names = splits if is_sequence else ["all at once"]
    axis.set_xticks(range(len(splits)), splits, fontsize=8)
    axis.set_yticks(range(len(row_names)), row_names, fontsize=8)
    axis.set_title(title, fontsize=10, fontweight="bold")
    axis.set_xlabel("score on split j", fontsize=8)
    if is_sequence:
        axis.set_ylabel("after training split i", fontsize=8)
    return image


def _draw_split(axis: Axes, split_index: int, matrices: Mapping[str, NDArray[np.float64]], splits: list[str]) -> None:
    positions = np.arange(len(splits))
    for index, (method, scores) in enumerate(matrices.items()):
        color, line = COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]
        column = scores[:, :, split_index]
        mean, deviation = column.mean(0), column.std(0, ddof=1) if len(column) > 1 else np.zeros(column.shape[1])
        if len(mean) == len(splits):
            _plot_measured(axis, mean, line, color=color, label=drawn(method), linewidth=1.6)
            axis.fill_between(positions, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
        else:
            axis.axhline(mean[0], color=color, linestyle="--", linewidth=1.4, label=drawn(method))
    axis.axvline(split_index, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_title(f"split {splits[split_index]}", fontsize=9)
    axis.set_xticks(positions, splits, fontsize=7)
    axis.set_xlabel("after training", fontsize=8)
    axis.set_ylim(0, 1.02)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_measured(axis: Axes, values: NDArray[np.float64], style: str, **options: Any) -> None:
    """A line through the values that are not NaN."""
    positions = np.flatnonzero(~np.isnan(values))
    axis.plot(positions, values[positions], style, marker="o", markersize=3, **options)
