"""What looks like forgetting: is a split forgotten, or confused with others? And which classes, and which pairs of classes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mas_embed.evaluation import Items, Recording, Results
from mas_embed.report.drawing import INK, LINE, PAPER, Margins, Style, drawn, panel, plain_axis, room_for, score_limits
from mas_embed.report.figures import short_score, styles_of_results
from mas_embed.report.tables import Table, mean_and_deviation, metric_name, number

SMALL = 0.01  # a fall that is next to nothing
MOST_CLASSES = 12  # in a picture
MOST_PAIRS = 8  # in a list


@dataclass(frozen=True)
class OwnAndAllOfMethod:
    """Means over the seeds: the score of a split when it was learned, and in the end, among its own items and among all."""

    method: str
    own_learned: float
    own_final: float
    all_learned: float
    all_final: float

    @property
    def verdict(self) -> str:
        """Whether what was lost is forgotten or confused."""
        own, everything = self.own_learned - self.own_final, self.all_learned - self.all_final
        if everything < SMALL and own < SMALL:
            return "kept"
        if own < SMALL:
            return "confused"
        if own > everything - SMALL:
            return "forgotten"
        return "mostly confused" if own <= everything / 2 else "mostly forgotten"

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        numbers = (
            f"Among its own items a split scores {number(self.own_final, 2)} in the end ({number(self.own_learned, 2)} when "
            f"learned), among the items of all splits {number(self.all_final, 2)} ({number(self.all_learned, 2)})"
        )
        meant = {
            "kept": "nothing is lost",
            "confused": "its classes are still told apart, but they have come to lie where classes of other splits lie",
            "mostly confused": "most of what is lost is lost to classes of other splits that lie in the same place",
            "mostly forgotten": "most of what is lost is lost among its own classes, which are no longer told apart as well",
            "forgotten": "its classes are no longer told apart as well, even among themselves",
        }
        return f"{numbers}: {meant[self.verdict]}."


@dataclass(frozen=True)
class ConfusedPair:
    """A class that is taken for another one now, counted over the recorded queries of all seeds."""

    name: str
    nearest: str
    learned: int
    now: int
    num_queries: int
    is_newer: bool


def own_and_all_of(results: Results) -> list[OwnAndAllOfMethod]:
    """By method the scores among the own items and among all; empty where that was not recorded."""
    found = []
    for method in results.methods:
        pairs = [run.own_and_all(results.primary_metric) for run in results.runs_of(method)]
        values = [
            (one.own.learning, one.own.final_average, one.all.learning, one.all.final_average)
            for one in pairs
            if one is not None and one.own.is_sequential
        ]
        if values and np.isfinite(values).all():
            found.append(OwnAndAllOfMethod(method, *map(float, np.mean(values, axis=0))))
    return found


def own_table(results: Results) -> Table:
    """Final average and forgetting among the own items and among all, by method."""
    rows = []
    for method in results.methods:
        pairs = [
            pair for run in results.runs_of(method) if (pair := run.own_and_all(results.primary_metric)) is not None
        ]
        if pairs:
            matrices = [[pair.own for pair in pairs], [pair.all for pair in pairs]]
            cells = [
                mean_and_deviation(getattr(matrix, measure) for matrix in one)
                for measure in ("final_average", "forgetting")
                for one in matrices
            ]
            rows.append([method, *cells])
    header = ["method", "own items", "all items", "forgetting, own", "forgetting, all"]
    return Table(
        f"{metric_name(results.primary_metric)} among the items of the own split, and of all splits", header, rows
    )


def own_and_all_figure(results: Results, found: Sequence[OwnAndAllOfMethod], *, width: float) -> Figure:
    """Two lines for each method, from when the splits were learned (a ring) to the end (a dot): own items above, all below."""
    figure, axis = panel(
        width, 46 * len(found) + 44, Margins(room_for([one.method for one in found]), bottom=40, right=64, top=4)
    )
    styles = styles_of_results(results)
    values = [value for one in found for value in (one.own_learned, one.own_final, one.all_learned, one.all_final)]
    for row, one in enumerate(found):
        lines = (
            (row - 0.18, "own", one.own_learned, one.own_final),
            (row + 0.2, "all", one.all_learned, one.all_final),
        )
        for y, text, start, end in lines:
            draw_fall(axis, y, start, end, styles[one.method])
            place: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "va": "center_baseline"}
            axis.text(1.01, y, f"{text} {short_score(end)}", color=INK, size=11, **place)
    axis.set(xlim=score_limits(min(values), max(values)), ylim=(len(found) - 0.4, -0.6))
    _named_rows(axis, [one.method for one in found])
    axis.set_xlabel(f"mean {drawn(metric_name(results.primary_metric))} over the splits")
    return figure


def classes_figure(
    recordings: Sequence[Recording], items: Items | None, style: Style, *, highest: float, width: float
) -> tuple[Figure, str] | None:
    """The classes of one method that fell most, from when their split was learned (a ring) to now (a dot); means over the seeds.

    Args:
        recordings: of the method, one for each seed.
        items: the names of classes.
        style: of the method.
        highest: the end of the scale.
        width: of the figure in pixels.

    Returns:
        The figure and what it shows in words; None if no class was recorded, or none has changed.
    """
    values: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for recording in recordings:
        if recording.classes is not None:
            columns = (
                recording.classes.label,
                recording.classes.split,
                recording.classes.learned,
                recording.classes.now,
            )
            for label, split, learned, now in zip(*(column.tolist() for column in columns), strict=True):
                if np.isfinite([learned, now]).all():
                    values.setdefault((label, split), []).append((learned, now))
    means = {key: np.mean(pairs, axis=0) for key, pairs in values.items()}
    fallen = sorted(means, key=lambda key: means[key][1] - means[key][0])[:MOST_CLASSES]
    if not fallen or all(abs(means[key][1] - means[key][0]) < SMALL for key in fallen):
        return None
    names = [items.name_of(label) if items else str(label) for label, _ in fallen]
    figure, axis = panel(width, 22 * len(fallen) + 32, Margins(room_for(names, size=11, most=140), top=4))
    for row, key in enumerate(fallen):
        learned, now = map(float, means[key])
        draw_fall(axis, row, learned, now, style)
    axis.set(xlim=(-0.02 * highest, 1.02 * highest), ylim=(len(fallen) - 0.4, -0.6))
    _named_rows(axis, names)
    words = (
        f"{name} from {short_score(means[key][0])} to {short_score(means[key][1])}"
        for name, key in zip(names, fallen, strict=True)
    )
    return figure, ", ".join(words)


def confused_pairs(recordings: Sequence[Recording], items: Items | None) -> list[ConfusedPair]:
    """The pairs of classes that one method confuses more than when they were learned, over its seeds; most first."""
    learned, now, queries = Counts(), Counts(), Counts()
    newer: dict[tuple[int, int], bool] = {}
    for recording in recordings:
        for one in recording.queries.confusions() if recording.queries is not None else []:
            key = one.label, one.nearest
            learned.add(key, one.learned)
            now.add(key, one.now)
            queries.add(key, one.num_queries)
            newer[key] = one.nearest_split > one.split >= 0
    order = sorted(newer, key=lambda key: (learned[key] - now[key], -now[key], key))[:MOST_PAIRS]
    name_of = items.name_of if items else str
    return [
        ConfusedPair(name_of(key[0]), name_of(key[1]), learned[key], now[key], queries[key], newer[key])
        for key in order
    ]


class Counts(dict[tuple[int, int], int]):
    """Numbers by pair of classes."""

    def add(self, key: tuple[int, int], count: int) -> None:
        """Adds to the number of a pair."""
        self[key] = self.get(key, 0) + count


def draw_fall(axis: Axes, y: float, start: float, end: float, style: Style) -> None:
    """A bar from a ring, the score when learned, to a dot, the score now."""
    axis.plot([start, end], [y, y], color=style.color, linewidth=4, alpha=0.28, solid_capstyle="butt", zorder=2)
    axis.plot(start, y, "o", color=style.color, markerfacecolor=PAPER, markersize=7, markeredgewidth=1.6, zorder=3)
    axis.plot(end, y, "o", color=style.color, markersize=7.5, zorder=4)


def _named_rows(axis: Axes, names: Sequence[str]) -> None:
    plain_axis(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color=LINE, linewidth=0.6)
    axis.spines["left"].set_visible(False)
    axis.set_yticks(range(len(names)), [drawn(name, 20) for name in names])
    axis.tick_params(axis="y", labelcolor=INK, labelsize=11)
