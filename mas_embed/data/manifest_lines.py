"""Lists with one item on each line, divided into splits and parts: what lists of texts and of images share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mas_embed.data.listed_lines import read_lines
from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.text import printable, shortened

PARTS = ("train", "validation", "test")
ONLY_SPLIT = "all"  # the name of the split of a list without the column split


class ManifestLine(NamedTuple):
    """One item. Its split, part and id are "" where the list has no such column.

    Attributes:
        where: the line, such as "line 3 of list.csv".
        value: the text, or the path of the image.
        label: the name of the class.
        split: the name of the split.
        part: one of `PARTS`.
        id: identifies an item that is listed in several splits.
        others: the values of further columns that were asked for.
    """

    where: str
    value: str
    label: str
    split: str
    part: str
    id: str
    others: Mapping[str, str]


def read_manifest(
    path: Path, column: str, *, most_characters: int, others: Sequence[str] = ()
) -> Iterator[ManifestLine]:
    """Yields the items of a list.

    Args:
        path: see `read_lines`.
        column: the name of the column of the texts or paths.
        most_characters: the largest number of characters of a value.
        others: the names of further columns that must have values.

    Raises:
        UserError: the list cannot be read, or a line lacks a value or has one that is not accepted; the message names the line.
    """
    required = (column, "label", *others)
    first: ManifestLine | None = None
    for where, values in read_lines(path, required, most_characters=most_characters):
        for name in (*required, "split", "part"):
            if values.get(name) == "":
                raise UserError(f"{where} has an empty {name}; give it a value, or remove the line")
        part = values.get("part", "")
        if part and part not in PARTS:
            raise UserError(f"{where} has the part '{shown(part)}'; it must be {', '.join(PARTS[:-1])} or {PARTS[-1]}")
        line = ManifestLine(
            where,
            values[column],
            values["label"],
            values.get("split", ""),
            part,
            values.get("id", ""),
            {name: values[name] for name in others},
        )
        first = first or line
        for name, one, other in (("part", line.part, first.part), ("split", line.split, first.split)):
            if bool(one) != bool(other):
                raise UserError(f"{where} and {first.where} must both have a {name}, or neither")
        yield line
    if first is None:
        raise UserError(f"{path} has no {column}; give it a line for each")


def group_by_split(
    lines: Iterable[ManifestLine], splits: Sequence[str] | None, path: Path, learned: Sequence[str] = ()
) -> dict[str, list[ManifestLine]]:
    """The lines of every split, in the order in which the splits are learned; that of their first lines for None.

    Splits that were learned before come first, and may have no lines.

    Raises:
        UserError: a split is unknown, or `splits` is empty.
    """
    found: dict[str, list[ManifestLine]] = {name: [] for name in learned}
    for line in lines:
        found.setdefault(line.split or ONLY_SPLIT, []).append(line)
    if splits is None:
        return found
    if not splits:
        raise UserError("splits must name at least one split, got an empty list; leave it out for all splits")
    for name in splits:
        if name not in found:
            raise unknown_name(f"split of {path}", name, found)
    return {name: found[name] for name in splits}


def check_ids(lines: Iterable[ManifestLine]) -> None:
    """Raises `UserError` for an id that is listed twice in a split, or in two parts."""
    first_lines: dict[str, ManifestLine] = {}
    seen: dict[tuple[str, str], ManifestLine] = {}
    for line in lines:
        if not line.id:
            continue
        first = first_lines.setdefault(line.id, line)
        other = seen.setdefault((line.split, line.id), line)
        is_divided = first is not line and (line.part != first.part or not line.part)
        if other is not line or is_divided:
            other = other if other is not line else first
            raise UserError(
                f"{line.where} has the id '{shown(line.id)}' of {other.where}; an id may be repeated only in another split "
                "and in the same part, which both lines must name"
            )


def shown(value: str) -> str:
    """A value of a list, for a message."""
    return shortened(printable(value), 60)
