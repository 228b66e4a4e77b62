"""Where the knowledge sits: importance by layer, and how far the layers moved against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from mas_embed.evaluation import RecordedParameters, Recording
from mas_embed.report.drawing import INK, LINE, Margins, Style, drawn, panel, panels, plain_axis, room_for
from mas_embed.report.labels import label_points

MOST_LAYERS = 18  # in a picture; the least important ones are left out


@dataclass(frozen=True)
class Layer:
    """Importance and movement of a layer, mean over the seeds.

    Attributes:
        name: of the layer.
        share: of the importance of all layers.
        quantiles: [5] of the importance of single values, the mean over the parameters weighted by their sizes.
        per_value: the mean importance of a single value.
        moved: how far the layer moved in the last split, relative to the norm of where it was; NaN if that is not known.
    """

    name: str
    share: float
    quantiles: NDArray[np.float64]
    per_value: float
    moved: float


def layers_of(recordings: Sequence[Recording]) -> list[Layer]:
    """The layers of one method in the model's order, mean over its seeds; empty without importance."""
    of_seeds = [_layers_of(one.parameters) for one in recordings if one.parameters is not None]
    of_seeds = [layers for layers in of_seeds if layers]
    if not of_seeds or len({tuple(layer.name for layer in layers) for layers in of_seeds}) > 1:
        return of_seeds[0] if of_seeds else []
    return [
        Layer(
            same[0].name,
            float(np.mean([layer.share for layer in same])),
            np.mean([layer.quantiles for layer in same], axis=0),
            float(np.mean([layer.per_value for layer in same])),
            float(np.mean([layer.moved for layer in same])),
        )
        for same in zip(*of_seeds, strict=True)
    ]


def _layers_of(parameters: RecordedParameters) -> list[Layer]:
    importance = parameters.importance_now.astype(np.float64)
    total = importance.sum()
    if not np.isfinite(total) or total <= 0:
        return []
    layers = []
    for name, positions in parameters.layers().items():
        sizes = parameters.num_values[positions].astype(np.float64)
        moved = norm = np.array([np.nan])
        if len(parameters.moved):
            moved, norm = parameters.moved[-1][positions], parameters.anchor_norm[-1][positions]
        relative = float(np.sqrt(moved.sum() / norm.sum())) if norm.sum() > 0 else float("nan")
        quantiles = (parameters.quantiles[positions] * sizes[:, None]).sum(0) / sizes.sum()
        share = float(importance[positions].sum() / total)
        layers.append(Layer(name, share, quantiles, float(importance[positions].sum() / sizes.sum()), relative))
    return layers


def importance_figure(layers: Sequence[Layer], style: Style, *, width: float) -> Figure:
    """By layer the share of the importance (a bar), and the quantiles of single values on a logarithmic axis beside it."""
    shown = most_important(layers)
    names = [drawn(layer.name, 24) for layer in shown]
    margins = Margins(room_for(names, size=11, most=150), bottom=42, right=14, top=4)
    options = {"sharey": True, "width_ratios": [1.2, 1]}
    figure, (shares, values) = panels(width, 21 * len(shown) + 54, margins, num_columns=2, gap=14, **options)
    rows = np.arange(len(shown))
    shares.barh(rows, [layer.share for layer in shown], height=0.62, color=style.color)
    for row, layer in enumerate(shown):
        shares.text(layer.share, row, f" {layer.share:.0%}", va="center_baseline", size=10, color=INK)
        low, quarter, middle, three_quarters, high = np.maximum(layer.quantiles, 0)
        if high > 0:
            floor = high / 1e6
            values.plot([max(low, floor), high], [row, row], color=style.color, linewidth=1)
            half = [max(quarter, floor), max(three_quarters, floor)]
            values.plot(half, [row, row], color=style.color, linewidth=6, alpha=0.45, solid_capstyle="butt")
            values.plot(max(middle, floor), row, "o", color=style.color, markersize=5)
    for axis in (shares, values):
        plain_axis(axis)
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
    shares.set_yticks(rows, names)
    shares.tick_params(axis="y", labelcolor=INK, labelsize=11)
    shares.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, max(layer.share for layer in shown) * 1.28), xticks=[])
    shares.set_xlabel("share of the importance")
    if any(layer.quantiles[-1] > 0 for layer in shown):
        values.set_xscale("log")
        values.xaxis.set_minor_locator(NullLocator())
    values.grid(axis="x", color=LINE, linewidth=0.6)
    values.set_xlabel("of single values")
    return figure


def movement_figure(layers: Sequence[Layer], style: Style, *, width: float) -> Figure | None:
    """A point for each layer: its importance for a single value (to the right) against how far it moved (upwards)."""
    shown = [layer for layer in layers if layer.per_value > 0 and np.isfinite(layer.moved) and layer.moved > 0]
    if len(shown) < 2:
        return None
    figure, axis = panel(width, min(280, width * 0.8), Margins(58, 44))
    axis.plot(
        [layer.per_value for layer in shown],
        [layer.moved for layer in shown],
        style.marker,
        color=style.color,
        markersize=8,
    )
    plain_axis(axis)
    axis.set(xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
    axis.margins(0.2)
    axis.set_xlabel("importance of a single value")
    axis.set_ylabel("relative movement")
    ordered = sorted(shown, key=lambda layer: -layer.share)
    label_points(axis, {layer.name: (layer.per_value, layer.moved) for layer in ordered}, leaves_out=True)
    return figure


def most_important(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with the largest shares, in the model's order."""
    kept = set(sorted(range(len(layers)), key=lambda index: -layers[index].share)[:MOST_LAYERS])
    return [layer for index, layer in enumerate(layers) if index in kept]


def in_words(layers: Sequence[Layer]) -> str:
    """The shares of the most important layers."""
    return ", ".join(f"{layer.name} {layer.share:.0%}" for layer in sorted(layers, key=lambda one: -one.share)[:5])
