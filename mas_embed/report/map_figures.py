"""A map of the embeddings of old classes, when they were learned and now."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mas_embed.errors import UserError, unknown_name
from mas_embed.evaluation import EmbeddingMap, Items
from mas_embed.report.drawing import COLORS, INK, LINE, MARKERS, MUTED, PAPER, Margins, drawn, panels

MapMethod = Literal["pca", "tsne", "umap"]
FEWEST = 4  # items of a map
MOST_NAMED = 12  # classes of a map that have a name, a colour and an arrow


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

    Of many classes, those that moved farthest are named, and the others are grey.

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
    moved = _classes_by_movement(learned, now, labels)
    named = moved if len(moved) <= MOST_NAMED else moved[:MOST_NAMED]
    names = {label: drawn(items.name_of(label) if items else str(label), 14) for label in moved}
    for axis, points, title in zip(axes, (learned, now), ("when learned", "now"), strict=True):
        _draw_points(axis, points, labels, sorted(named))
        axis.set_title(title, fontsize=11, color=MUTED)
    for label in named:
        before, after = _mean(learned, labels, label), _mean(now, labels, label)
        _name_class(axes[0], before, names[label])
        _draw_arrow(axes[1], before, after, _style_of(sorted(named).index(label))[0])
        _name_class(axes[1], after, names[label])
    return figure, ", ".join(names[label] for label in moved[:5])


def _classes_by_movement(learned: NDArray[Any], now: NDArray[Any], labels: NDArray[Any]) -> list[int]:
    """The classes, that whose mean moved farthest first."""
    classes = list(dict.fromkeys(labels.tolist()))
    far = {label: np.linalg.norm(_mean(now, labels, label) - _mean(learned, labels, label)) for label in classes}
    return sorted(classes, key=lambda label: -float(far[label]))


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


def _draw_points(axis: Axes, points: NDArray[Any], labels: NDArray[Any], named: list[int]) -> None:
    """The items of the classes that are named, above those of the others in grey."""
    others = ~np.isin(labels, named)
    if others.any():
        _draw_class(axis, points[others], MUTED, ".", alpha=0.3)
    for index, label in enumerate(named):
        _draw_class(axis, points[labels == label], *_style_of(index), alpha=0.6)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color(LINE)
    axis.margins(0.09)


def _draw_class(axis: Axes, points: NDArray[Any], color: str, marker: str, *, alpha: float) -> None:
    axis.plot(
        points[:, 0],
        points[:, 1],
        marker,
        color=color,
        alpha=alpha,
        markersize=4.5,
        markeredgewidth=0,
        linestyle="none",
    )


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
    plate = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    axis.text(place[0], place[1], name, size=10, weight="bold", color=INK, ha="center", va="bottom", bbox=plate)


def _mean(points: NDArray[Any], labels: NDArray[Any], label: int) -> NDArray[np.float64]:
    return points[labels == label].mean(0)
