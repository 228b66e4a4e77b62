"""Pictures that compare the methods: what each learned and kept, and forgetting against learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mas_embed.evaluation import Results
from mas_embed.report.drawing import INK, LINE, MUTED, PAPER, Margins, drawn, panel, plain_axis, room_for, score_limits
from mas_embed.report.figures import references_of, short_score, styles_of_results
from mas_embed.report.labels import label_points
from mas_embed.report.tables import metric_name

ROW_HEIGHT = 30  # pixels
LEAST_SPAN = 0.04  # of the axes of the trade-off, so that differences which mean nothing look small


def kept_figure(results: Results, *, width: float = 720) -> Figure:
    """A row for each method: from the mean score when the splits were learned (a ring) to that in the end (a dot).

    The best stands on top. A bar through the dot is one deviation over the seeds. Methods that are trained on everything at once
    are a vertical dashed line, too, because nothing is expected above them.
    """
    final, learned = (measured(results, name) for name in ("final_average", "learning"))
    methods = sorted(results.methods, key=lambda name: -np.nan_to_num(_mean(final[name]), nan=-np.inf))
    names = [drawn(name, 22) for name in methods]
    figure, axis = panel(
        width, ROW_HEIGHT * len(methods) + 48, Margins(left=room_for(names), bottom=40, right=44, top=4)
    )
    everything = [value for values in (*final.values(), *learned.values()) for value in values]
    low, high = score_limits(min(everything, default=np.nan), max(everything, default=np.nan))
    styles, references = styles_of_results(results), references_of(results)
    for row, method in enumerate(methods):
        style, end, start = styles[method], _mean(final[method]), _mean(learned[method])
        if method in references and np.isfinite(end):
            axis.axvline(end, color=style.color, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        if np.isfinite(start):
            axis.plot(
                [start, end], [row, row], color=style.color, linewidth=5, alpha=0.28, solid_capstyle="butt", zorder=2
            )
            axis.plot(
                start, row, "o", color=style.color, markerfacecolor=PAPER, markersize=8, markeredgewidth=1.8, zorder=3
            )
        axis.errorbar(end, row, xerr=_deviation(final[method]), color=style.color, elinewidth=1.6, capsize=0, zorder=3)
        axis.plot(end, row, "o", color=style.color, markersize=9, zorder=4)
        axis.text(
            1.01, row, short_score(end), transform=axis.get_yaxis_transform(), va="center_baseline", color=INK, size=12
        )
    axis.set(xlim=(low, high), ylim=(len(methods) - 0.5, -0.6))
    plain_axis(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=LINE, linewidth=0.6)
    axis.spines["left"].set_visible(False)
    axis.set_yticks(range(len(methods)), names)
    axis.tick_params(axis="y", labelcolor=INK, labelsize=12)
    axis.set_xlabel(f"mean {drawn(metric_name(results.primary_metric))} over the splits")
    return figure


def trade_off_figure(results: Results, groups: Sequence[Sequence[str]] = (), *, width: float = 520) -> Figure:
    """Forgetting (to the right) against learning (upwards), a point for each method with one deviation over the seeds.

    Args:
        results: of the run.
        groups: methods that differ in one number only, such as their strength, in its order; a thin line joins them.
        width: in pixels.
    """
    forgetting, learning = (measured(results, name) for name in ("forgetting", "learning"))
    points = {name: (_mean(forgetting[name]), _mean(learning[name])) for name in results.methods}
    points = {name: point for name, point in points.items() if np.isfinite(point).all()}
    figure, axis = panel(width, min(370, width * 0.85), Margins(left=52, bottom=42))
    for group in groups:
        joined = [points[name] for name in group if name in points]
        if len(joined) > 1:
            axis.plot(*zip(*joined, strict=True), color=MUTED, linewidth=1, zorder=1)
    styles = styles_of_results(results)
    for name, (x, y) in points.items():
        spread = _deviation(learning[name]), _deviation(forgetting[name])
        axis.errorbar(x, y, *spread, color=styles[name].color, elinewidth=1, alpha=0.55, zorder=2)
        axis.plot(x, y, styles[name].marker, color=styles[name].color, markersize=9, zorder=3)
    plain_axis(axis)
    axis.grid(axis="both", color=LINE, linewidth=0.6)
    axis.margins(0.16)
    axis.update_datalim(
        [(x + side, y + side) for x, y in points.values() for side in (-LEAST_SPAN / 2, LEAST_SPAN / 2)]
    )
    metric = drawn(metric_name(results.primary_metric))
    axis.set_xlabel(f"forgetting: fall of the {metric} from its best, less is better")
    axis.set_ylabel("learning: score when just learned")
    label_points(axis, points)
    return figure


def measured(results: Results, measure: str) -> Mapping[str, list[float]]:
    """By method a measure of the primary metric for every seed that has it."""
    return {
        method: [
            value
            for run in results.runs_of(method)
            if (value := run.measures[results.primary_metric][measure]) is not None
        ]
        for method in results.methods
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
