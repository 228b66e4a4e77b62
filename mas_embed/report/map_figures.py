"""A map of the embeddings of old classes, when they were learned and now."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from mas_embed.errors import UserError, unknown_name
from mas_embed.evaluation import EmbeddingMap, Items
from mas_embed.report.drawing import COLORS, INK, LINE, MARKERS, MUTED, PAPER, Margins, drawn, panels

MapMethod = Literal["pca", "tsne", "umap"]
FEWEST = 4  # items of a map


def check_map_method(method: str) -> None:
    """Raises `UserError` unless the map can be drawn by this method.

    Raises:
        UserError: it is none of those, or its library is missing.
    """
    if method not in get_args(MapMethod):
        raise unknown_name("method of the map", method, get_args(MapMethod))
    if method == "umap":
        try:
            importlib.import_module("umap")
        except ImportError:
            raise UserError(
                "--map umap needs the library umap-learn: pip install umap-learn, or take --map tsne"
            ) from None


def map_figure(embedded: EmbeddingMap, items: Items | None, method: str, *, width: float) -> tuple[Figure, str] | None:
    """Two panels with the same axes: items when their split was learned, and now, with arrows for the means of their classes.

    Args:
        embedded: the items.
        items: the names of the classes.
        method: "pca" draws the first two principal components, "tsne" and "umap" are fitted on both times together.
        width: of the figure in pixels.

    Returns:
        The figure and what it shows in words; None for fewer than four learned items.
    """
    is_there = np.isfinite(embedded.learned).all(1) & np.isfinite(embedded.now).all(1)
    if is_there.sum() < FEWEST or embedded.learned.shape[1] < 2:
        return None
    labels = embedded.label[is_there]
    learned, now = _projected(embedded.learned[is_there], embedded.now[is_there], method)
    shared = {"sharex": True, "sharey": True}
    figure, axes = panels(width, width / 2 + 20, Margins(3, 3, 3, 22), num_columns=2, gap=8, **shared)
    classes = list(dict.fromkeys(labels.tolist()))
    names = {label: drawn(items.name_of(label) if items else str(label), 14) for label in classes}
    for axis, points, title in zip(axes, (learned, now), ("when learned", "now"), strict=True):
        _draw_points(axis, points, labels, classes)
        axis.set_title(title, fontsize=11, color=MUTED)
    means = [(label, _means(learned, labels, label), _means(now, labels, label)) for label in classes]
    for label, before, after in means:
        _name_class(axes[0], before, names[label])
        _draw_arrow(axes[1], before, after, _style_of(classes.index(label))[0])
        _name_class(axes[1], after, names[label])
    moved = sorted(means, key=lambda one: -float(np.linalg.norm(one[2] - one[1])))[:5]
    return figure, ", ".join(names[label] for label, *_ in moved)


def _projected(
    learned: NDArray[Any], now: NDArray[Any], method: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both times in two dimensions."""
    both = np.concatenate([learned, now]).astype(np.float64)
    if method == "pca":
        points = both[:, :2]
    elif method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(both) - 1) / 3)
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(both)
    else:
        umap = importlib.import_module("umap")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a seed that keeps it to one thread
            points = umap.UMAP(n_neighbors=min(15, len(both) - 1), random_state=0).fit_transform(both)
    return points[: len(learned)], points[len(learned) :]


def _draw_points(axis: Axes, points: NDArray[Any], labels: NDArray[Any], classes: list[int]) -> None:
    for index, label in enumerate(classes):
        color, marker = _style_of(index)
        chosen = points[labels == label]
        axis.plot(
            chosen[:, 0],
            chosen[:, 1],
            marker,
            color=color,
            markersize=4.5,
            alpha=0.6,
            markeredgewidth=0,
            linestyle="none",
        )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(LINE)
    axis.margins(0.09)


def _style_of(index: int) -> tuple[str, str]:
    return COLORS[index % len(COLORS)], MARKERS[index // len(COLORS) % len(MARKERS)]


def _draw_arrow(axis: Axes, before: NDArray[Any], after: NDArray[Any], color: str) -> None:
    axis.annotate(
        "",
        tuple(after),
        tuple(before),
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0},
    )
    axis.plot(*before, "o", color=color, markerfacecolor=PAPER, markersize=5)


def _name_class(axis: Axes, place: NDArray[Any], name: str) -> None:
    halo = [withStroke(linewidth=3, foreground=PAPER)]
    axis.text(place[0], place[1], name, size=10, weight="bold", color=INK, ha="center", va="bottom", path_effects=halo)


def _means(points: NDArray[Any], labels: NDArray[Any], label: int) -> NDArray[np.float64]:
    return points[labels == label].mean(0)
