"""The queries that were forgotten, and those that an update improved: what each method found for them, then and now."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mas_embed.evaluation import (
    Item,
    Items,
    RecordedNeighbours,
    RecordedQueries,
    Recording,
    first_seeds,
    queries_to_show,
)
from mas_embed.report.drawing import Style
from mas_embed.runtime.text import shortened

LONGEST_TEXT = 160  # characters of an item
FEW_PIXELS = 16  # of a side of a picture that is readable when it is small


@dataclass(frozen=True)
class Tile:
    """An item as the page shows it: its picture, or else its text, or else the name of its class.

    Attributes:
        name: of its class.
        symbol: the name of its picture in the page; "" without one.
        text: "" without one.
        is_right: whether it is of the class of the query; None for the query itself.
    """

    name: str
    symbol: str = ""
    text: str = ""
    is_right: bool | None = None

    @property
    def label(self) -> str:
        """What it shows, for those who do not see it."""
        sign = "" if self.is_right is None else ", right" if self.is_right else ", wrong"
        return f"{self.text or self.name}{sign}"


@dataclass(frozen=True)
class Found:
    """What one method found for a query when its split was learned, and finds now; with the score of either."""

    method: str
    group: str
    learned: list[Tile]
    now: list[Tile]
    score_learned: float
    score_now: float


@dataclass(frozen=True)
class QueryCard:
    """A query with what every method found for it.

    Attributes:
        query: the item, or the class.
        split: the name of its split.
        change: of its score since it was learned, mean over the methods.
        found: by method.
    """

    query: Tile
    split: str
    change: float
    found: list[Found]


@dataclass
class Gallery:
    """The section of the page.

    Attributes:
        fallen: the queries whose score fell most.
        improved: the queries whose score rose most.
        symbols: by name the pictures that stand in it, as data URIs.
        score_name: of the scores.
        note: why there is no picture; "" where there are some.
        nearest: how the page calls what was found.
        is_of_texts: whether items are texts.
        is_wide: whether what was found needs room: names, or pictures of more than 16 pixels.
        is_coarse: whether pictures have so few pixels that these are shown as squares.
    """

    fallen: list[QueryCard] = field(default_factory=list)
    improved: list[QueryCard] = field(default_factory=list)
    symbols: dict[str, str] = field(default_factory=dict)
    score_name: str = ""
    note: str = ""
    is_of_texts: bool = False
    is_wide: bool = False
    is_coarse: bool = False
    nearest: str = "nearest"


def gallery_of(recordings: Sequence[Recording], items: Items | None, styles: dict[str, Style]) -> Gallery | None:
    """The gallery of a run; None if no neighbours were recorded.

    Args:
        recordings: of all methods and seeds. Of every method the first seed is shown.
        items: pictures, texts and names; None if there are none.
        styles: by method; a method without one is left out.
    """
    shown = [one for one in _of_one_sample(first_seeds(recordings)) if one.method in styles and _can_fall(one)]
    if not shown:
        return None
    first = _queries(shown[0])
    gallery = Gallery(score_name=first.score_name, note=items.note or "" if items else "Pictures were not recorded.")
    tiles = _Tiles(items or Items(), gallery.symbols)
    for positions, cards in zip(queries_to_show(shown), (gallery.fallen, gallery.improved), strict=True):
        for position in positions:
            cards.append(_card(position, shown, tiles, styles))
    gallery.is_of_texts = tiles.has_texts
    gallery.is_wide = tiles.most_pixels > FEW_PIXELS or first.neighbour_kind == "label" or not gallery.symbols
    gallery.is_coarse = tiles.most_pixels <= 2 * FEW_PIXELS
    gallery.nearest = "highest" if first.neighbour_kind == "label" else "nearest"
    return gallery


@dataclass
class _Tiles:
    """Makes tiles, and collects their pictures."""

    items: Items
    symbols: dict[str, str]
    has_texts: bool = False
    most_pixels: int = 0

    def query(self, queries: RecordedQueries, position: int) -> Tile:
        name = self.items.name_of(int(queries.label[position]))
        if queries.kind == "label":
            return Tile(name)
        return self._tile(name, "query", int(queries.split[position]), int(queries.index[position]), None)

    def neighbours(self, queries: RecordedQueries, found: RecordedNeighbours, position: int) -> list[Tile]:
        tiles = []
        for rank in range(found.label.shape[1]):
            label = int(found.label[position, rank])
            if label >= 0:
                place = int(found.split[position, rank]), int(found.index[position, rank])
                is_right = label == int(queries.label[position])
                tiles.append(self._tile(self.items.name_of(label), "gallery", *place, is_right))
        return tiles

    def _tile(self, name: str, part: Any, split: int, index: int, is_right: bool | None) -> Tile:
        item: Item | None = self.items.get(part, split, index) if index >= 0 else None
        if item is None:
            return Tile(name, is_right=is_right)
        symbol = ""
        if item.picture is not None:
            symbol = "-".join(map(str, ("item", *self.items.key_of(part, split, index))))
            if symbol not in self.symbols:
                self.symbols[symbol] = item.data_uri
                self.most_pixels = max(self.most_pixels, _num_pixels(item.picture))
        self.has_texts = self.has_texts or bool(item.text)
        return Tile(name, symbol, shortened(item.text or "", LONGEST_TEXT), is_right)


def _card(position: int, shown: Sequence[Recording], tiles: _Tiles, styles: dict[str, Style]) -> QueryCard:
    first = _queries(shown[0])
    found = []
    for recording in shown:
        queries = _queries(recording)
        if queries.is_learned[position]:
            found.append(
                Found(
                    recording.method,
                    styles[recording.method].group,
                    tiles.neighbours(queries, queries.learned, position),
                    tiles.neighbours(queries, queries.now, position),
                    float(queries.score_learned[position]),
                    float(queries.score_now[position]),
                )
            )
    change = float(np.mean([one.score_now - one.score_learned for one in found])) if found else 0.0
    return QueryCard(tiles.query(first, position), shown[0].splits[int(first.split[position])], change, found)


def _num_pixels(picture: bytes) -> int:
    """The longest side of a picture; 0 for one that cannot be read."""
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return max(image.size)
    except (OSError, ValueError):
        return 0


def _queries(recording: Recording) -> RecordedQueries:
    assert recording.queries is not None
    return recording.queries


def _of_one_sample(recordings: Sequence[Recording]) -> list[Recording]:
    """The recordings whose queries are those of the first; other runs that are compared may have drawn others."""
    if not recordings:
        return []
    first = _queries(recordings[0])
    return [
        one
        for one in recordings
        if all(
            np.array_equal(getattr(_queries(one), name), getattr(first, name)) for name in ("split", "index", "label")
        )
    ]


def _can_fall(recording: Recording) -> bool:
    """Whether its queries were evaluated more than once, so that their scores can change."""
    return len(_queries(recording).scores) > 1
