"""What the page shows of recordings: confusions, classes, layers and the map; a section without data is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mas_embed.evaluation import Items, Recording, Results
from mas_embed.report.confusions import (
    ConfusedPair,
    classes_figure,
    confused_pairs,
    own_and_all_figure,
    own_and_all_of,
    own_table,
)
from mas_embed.report.drawing import Style, picture, score_limits
from mas_embed.report.figures import references_of
from mas_embed.report.layer_figures import importance_figure, in_words, layers_of, movement_figure
from mas_embed.report.map_figures import MOST_NAMED, map_figure
from mas_embed.report.page_tables import page_table
from mas_embed.report.panels import NARROW, Panel
from mas_embed.report.run_files import RunFiles


@dataclass(frozen=True)
class Recorded:
    """The recordings of all run directories.

    Attributes:
        by_method: the recordings of every method that is shown, in the order of the methods.
        items: pictures, texts and names; None if nothing was stored.
        styles: of the methods.
    """

    by_method: Mapping[str, list[Recording]]
    items: Items | None
    styles: dict[str, Style]

    @property
    def recordings(self) -> list[Recording]:
        """All of them."""
        return [one for recordings in self.by_method.values() for one in recordings]


def recorded_of(run_files: Sequence[RunFiles], styles: dict[str, Style]) -> Recorded:
    """The recordings of methods that have a style, and all items together."""
    recordings = [one for files in run_files for one in files.recordings]
    by_method = {method: [one for one in recordings if one.method == method] for method in styles}
    stored = [files.items for files in run_files if files.items is not None]
    items = None
    if stored:
        items = Items(
            {key: item for one in stored for key, item in one.items.items()},
            {label: name for one in stored for label, name in one.label_names.items()},
            frozenset().union(*(one.shared_parts for one in stored)),
            stored[0].note,
        )
    return Recorded({method: found for method, found in by_method.items() if found}, items, styles)


def confused_section(results: Results, recorded: Recorded, figures: dict[str, Figure]) -> dict[str, Any] | None:
    """Forgotten or confused, for every method; the classes that fell, and the pairs that are confused now."""
    own = own_and_all_of(results)
    classes, pairs = class_panels(recorded), pairs_of(recorded)
    if not own and not classes and not pairs:
        return None
    panel = None
    if own:
        label = "Scores when learned and in the end, among the own items and among all. " + " ".join(
            f"{one.method}: {one.sentence}" for one in own
        )
        wide, narrow = (picture(own_and_all_figure(results, own, width=width), label) for width in (640, NARROW))
        panel = Panel(wide, "", narrow)
        figures["confused"] = own_and_all_figure(results, own, width=720)
    table = page_table(
        own_table(results),
        notes={
            "own items": ("final average, each split searched alone", "high"),
            "all items": ("final average, all splits searched together", "high"),
            "forgetting, own": ("fall from the best, each split alone", "low"),
            "forgetting, all": ("fall from the best, all splits together", "low"),
        },
        unranked=references_of(results),
    )
    return {"own": own, "panel": panel, "table": table if own else None, "classes": classes, "pairs": pairs}


def class_panels(recorded: Recorded) -> list[Panel]:
    """For every method the classes that fell most."""
    panels = []
    classes = [one.classes for one in recorded.recordings if one.classes is not None]
    scores = np.concatenate([np.concatenate([one.learned, one.now]) for one in classes] or [np.empty(0)])
    _, highest = score_limits(0.0, float(np.nanmax(scores)) if np.isfinite(scores).any() else 1.0)
    for method, recordings in recorded.by_method.items():
        style = recorded.styles[method]
        found = classes_figure(recordings, recorded.items, style, highest=highest, width=NARROW)
        if found is not None and len(recordings[0].splits) > 1 and _has_rows(recordings):
            figure, words = found
            panels.append(Panel(picture(figure, f"Classes of {method} that changed most: {words}"), method))
    return panels


def pairs_of(recorded: Recorded) -> list[tuple[str, list[ConfusedPair]]]:
    """By method the pairs of classes that it confuses more than when they were learned."""
    found = [
        (method, confused_pairs(recordings, recorded.items))
        for method, recordings in recorded.by_method.items()
        if _has_rows(recordings)
    ]
    return [(method, pairs) for method, pairs in found if pairs]


def layers_section(recorded: Recorded, shares: Sequence[Panel], figures: dict[str, Figure]) -> dict[str, Any] | None:
    """Importance by layer, movement against importance, and the penalty's share of the loss over time."""
    importance, movement = [], []
    for method, recordings in recorded.by_method.items():
        layers = layers_of(recordings)
        if not layers:
            continue
        style = recorded.styles[method]
        label = f"Importance of the layers of {method}: {in_words(layers)}"
        wide, narrow = (picture(importance_figure(layers, style, width=width), label) for width in (520, NARROW))
        importance.append(Panel(wide, method, narrow))
        figures.setdefault("layers", importance_figure(layers, style, width=620))
        figure = movement_figure(layers, style, width=NARROW)
        if figure is not None:
            points = "; ".join(f"{one.name} {one.per_value:.2g} and {one.moved:.2g}" for one in layers[:12])
            label = (
                f"Importance of a single value and relative movement in the last split, by layer of {method}: {points}"
            )
            movement.append(Panel(picture(figure, label), method))
    if not importance and not shares:
        return None
    return {"importance": importance, "movement": movement, "shares": shares}


def map_section(recorded: Recorded, method: str, figures: dict[str, Figure]) -> dict[str, Any] | None:
    """For every method a map of the embeddings of its first seed, when learned and now."""
    panels = []
    for title, recordings in recorded.by_method.items():
        embedded = recordings[0].map
        if embedded is None or not _has_rows(recordings[:1]):
            continue
        found = map_figure(embedded, recorded.items, method, width=540)
        if found is None:
            continue
        figure, moved = found
        label = f"Map of the embeddings of {title}, when learned and now; the classes that moved most: {moved}"
        narrow = map_figure(embedded, recorded.items, method, width=NARROW)
        assert narrow is not None
        share = f", {float(embedded.explained[:2].sum()):.0%} of the variance" if method == "pca" else ""
        panels.append(Panel(picture(figure, label), title + share, picture(narrow[0], label)))
        figures.setdefault("map", figure)
    names = {"pca": "the first two principal components", "tsne": "t-SNE", "umap": "UMAP"}
    return {"panels": panels, "method": names[method], "most_named": MOST_NAMED} if panels else None


def _has_rows(recordings: Sequence[Recording]) -> bool:
    """Whether the model was evaluated more than once, so that anything can have changed."""
    queries = recordings[0].queries
    return queries is None or len(queries.scores) > 1
