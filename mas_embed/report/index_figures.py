"""Pictures of the index that was made before the updates of the model: its scores, its drift and its churn."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mas_embed.evaluation import Results
from mas_embed.report.drawing import drawn, name_ticks, plain_axis, score_limits
from mas_embed.report.figures import LONGEST_TICK, MOST_PANELS, draw_line, styles_of_results
from mas_embed.report.tables import metric_name, so_far


def methods_with_index(results: Results) -> list[str]:
    """The methods whose runs have scores of a stale gallery."""
    metric = results.index_metric
    return [
        method
        for method in results.methods
        if any(run.stale_gallery_matrix(metric) is not None for run in results.runs_of(method))
    ]


def stale_gallery_figure(results: Results) -> Figure:
    """One panel for each method that was trained in splits: the mean score over all splits learned so far, after each of them.

    A solid line with the gallery embedded again after every split (fresh), a dashed one with a gallery that never is (stale);
    means over the seeds.
    """
    methods = methods_with_index(results)
    num_columns = min(len(methods), MOST_PANELS)
    num_rows = math.ceil(len(methods) / num_columns)
    figure = Figure(figsize=(max(2.6 * num_columns, 6), 2.3 * num_rows + 0.6), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for axis in panels[len(methods) :]:
        axis.set_visible(False)
    for axis, method in zip(panels, methods, strict=False):
        draw_stale_gallery(axis, results, method)
        axis.set_title(drawn(method))
        axis.set_xlabel("after training")
    for axis in panels[::num_columns]:
        axis.set_ylabel(f"{drawn(metric_name(results.index_metric))} of splits so far")
    figure.suptitle("A fresh gallery, embedded again after every split, and a stale one, which never is", fontsize=11)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_stale_gallery(axis: Axes, results: Results, method: str, *, width: float = 230) -> None:
    """The fresh and the stale gallery of one method over time, and between them what the stale one costs."""
    fresh, stale = (curve_so_far(results, method, stale=stale) for stale in (False, True))
    style = styles_of_results(results)[method]
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    positions = np.arange(len(names))
    axis.fill_between(positions, stale, fresh, color=style.color, alpha=0.14, linewidth=0)
    draw_line(axis, fresh, style, linestyle="-", label="fresh gallery")
    draw_line(axis, stale, style, linestyle=(0, (3, 2)), markerfacecolor="none", label="stale gallery")
    plain_axis(axis)
    name_ticks(axis, names, width=width)
    axis.set(xlim=(-0.3, len(names) - 0.7), ylim=index_limits(results))


def draw_moved(axis: Axes, results: Results, quantity: str, *, width: float) -> None:
    """The mean drift or churn of the old gallery after every update, a line for each method."""
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    styles = styles_of_results(results)
    for method in methods_with_index(results):
        rows = []
        for run in results.runs_of(method):
            values = {
                update.after: update.drift.mean if quantity == "drift" else update.churn for update in run.index_updates
            }
            rows.append([values.get(name, np.nan) for name in results.splits])
        mean = _mean_of_rows(np.array(rows, dtype=np.float64))
        draw_line(axis, mean, styles[method], label=drawn(method))
    plain_axis(axis)
    name_ticks(axis, names, width=width)
    axis.set(xlim=(0.7, len(names) - 0.7))
    axis.set_ylim(bottom=0)


def curve_so_far(results: Results, method: str, *, stale: bool) -> NDArray[np.float64]:
    """After every split the mean score of those learned so far, mean over the seeds with an index."""
    metric = results.index_metric
    runs = [run for run in results.runs_of(method) if run.stale_gallery_matrix(metric) is not None]
    return np.mean([so_far(run, metric, stale=stale) for run in runs], axis=0)


def index_limits(results: Results) -> tuple[float, float]:
    """One scale for the galleries of all methods."""
    values = np.concatenate(
        [
            curve_so_far(results, method, stale=stale)
            for method in methods_with_index(results)
            for stale in (False, True)
        ]
    )
    measured = values[np.isfinite(values)]
    return score_limits(float(measured.min()), float(measured.max())) if len(measured) else (0.0, 1.0)


def _mean_of_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    counts = np.isfinite(rows).sum(0)
    return np.where(counts > 0, np.where(np.isfinite(rows), rows, 0).sum(0) / np.maximum(counts, 1), np.nan)
