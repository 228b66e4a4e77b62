"""Tables as they stand in the page: every column explained, the best values marked, numbers ready for sorting."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from mas_embed.report.tables import Table

NOTHING = "\N{EN DASH}"  # in place of what was not measured

Direction = Literal["high", "low"]

# By the name of a column what it means, and whether high or low values are the good ones
NOTES: dict[str, tuple[str, Direction | None]] = {
    "final average": ("mean over all splits in the end", "high"),
    "forgetting": ("how far a split fell from its best", "low"),
    "backward transfer": ("change of a split since it was learned", "high"),
    "learning": ("score of a split when it has just been learned", "high"),
    "seconds": ("training, and what the method does when a split ends", "low"),
    "pooled": ("one score over the items of all splits together", "high"),
    "fresh gallery": ("final average, everything embedded again after every split", "high"),
    "stale gallery": ("final average, items keep the vector of their own split", "high"),
    "old on old": ("queries and gallery of the model before the update", None),
    "new on new": ("queries and gallery of the model after it", "high"),
    "new on old": ("new queries on the old gallery", "high"),
    "drift": ("how far items of the old gallery moved", "low"),
    "churn": ("share of a query's nearest items that it loses", "low"),
    "verdicts": ("on the index, over all updates and seeds", None),
    "keeps of the data": ("what the method stores of earlier splits", None),
    "KiB in all": ("memory for the splits so far, in the end", "low"),
    "ms per step": ("training time of one batch", "low"),
    "seconds at a split's end": ("importance, or what else the method computes", "low"),
    "on validation": ("the measure by which options were chosen", "high"),
}


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        name: what stands in it.
        note: what the numbers below mean; "" for nothing to say.
        better: which values are good; None if that cannot be said.
        is_text: whether its cells are words.
    """

    name: str
    note: str = ""
    better: Direction | None = None
    is_text: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what stands in it, without the deviation.
        deviation: over the seeds, "± .01"; "" where there is none.
        value: the number, by which rows are sorted; None for words and for what was not measured.
        is_best: whether it is the best of its column.
    """

    text: str
    deviation: str = ""
    value: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table of the page."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]


def page_table(
    table: Table,
    *,
    notes: Mapping[str, tuple[str, Direction | None]] | None = None,
    others: tuple[str, Direction | None] = ("", None),
    unranked: Collection[str] = (),
    title: str | None = None,
) -> PageTable:
    """A table with its columns explained and the best values marked.

    Args:
        table: of text, means and deviations as "a ± b".
        notes: by the name of a column what it means, before `NOTES`.
        others: the same for columns that neither has, but not for the first.
        unranked: names in the first column that are no candidates for the best value, such as joint training.
        title: in place of the table's.
    """
    found = {**NOTES, **(notes or {})}
    columns, cells = [], []
    for index, name in enumerate(table.header):
        note, better = found.get(name, others if index else ("", None))
        column = [_cell(row[index]) for row in table.rows]
        is_text = index == 0 or all(cell.value is None for cell in column)
        columns.append(Column(name, note, better, is_text))
        ranked = {
            row: cell.value
            for row, cell in enumerate(column)
            if cell.value is not None and _is_ranked(table.rows[row][0], unranked)
        }
        cells.append(_with_best(column, ranked, better) if index else [Cell(cell[0]) for cell in table.rows])
    rows = [list(row) for row in zip(*cells, strict=True)] if table.rows else []
    return PageTable(table.title if title is None else title, columns, rows)


def _is_ranked(name: str, unranked: Collection[str]) -> bool:
    return not any(name == other or name.startswith(f"{other} (keeps ") for other in unranked)


def _with_best(column: list[Cell], ranked: Mapping[int, float], better: Direction | None) -> list[Cell]:
    """The cells of a column, those with the best value marked; none if several have it."""
    if better is None or len(set(ranked.values())) < 2:
        return column
    best = (max if better == "high" else min)(ranked.values())
    if list(ranked.values()).count(best) > 1:
        return column
    return [Cell(cell.text, cell.deviation, cell.value, ranked.get(row) == best) for row, cell in enumerate(column)]


def _cell(text: str) -> Cell:
    """A cell of a table: a number, with a deviation or without; or words."""
    mean, sign, deviation = text.partition(" ± ")
    if re.fullmatch(r"-?[\d,]*\.?\d+", mean):
        value = float(mean.replace(",", ""))
        return Cell(
            mean.replace("-", "\N{MINUS SIGN}"), f"±\N{NARROW NO-BREAK SPACE}{deviation}" if sign else "", value
        )
    return Cell(NOTHING if text == "-" else text)
