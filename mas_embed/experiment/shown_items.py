"""The items that the report of a run can show, stored in its directory: pictures or texts of a few queries and neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mas_embed.data import Part, Split, SplitSequence, picture_of, thumbnail_of
from mas_embed.errors import UserError
from mas_embed.evaluation import (
    Item,
    ItemKey,
    Items,
    RecordedQueries,
    Recording,
    first_seeds,
    queries_to_show,
    read_items,
    read_recordings,
    write_items,
)
from mas_embed.runtime.text import shortened

MOST_BYTES = 4 * 2**20  # of pictures and texts
LONGEST_NAME = 100  # characters of the name of a class
LEFT_OUT = "Pictures and texts of items are left out (report.thumbnails: false)."
NO_PICTURES = "The items are neither images nor texts, so there is nothing to show of them."


def update_items(run_directory: Path, splits: Sequence[Split], *, thumbnails: bool) -> None:
    """Writes the items that the report shows of what the trainings have recorded so far; does nothing without recordings.

    They are the queries of `queries_to_show` and their neighbours, the most changed queries first, up to 4 MiB. Items that are
    stored already are not made again. What is written depends on the recordings and the data alone.

    Args:
        run_directory: of the run.
        splits: that its trainings evaluate.
        thumbnails: whether pictures and texts may be copied into the run directory.
    """
    recordings = first_seeds(read_recordings(run_directory))
    if not recordings:
        return
    shared = frozenset(index for index, split in enumerate(splits) if split.query is split.gallery)
    names = _label_names(splits, recordings)
    empty = Items({}, names, shared, None if thumbnails else LEFT_OUT)
    if not thumbnails:
        write_items(run_directory, empty)
        return
    known = _known_items(run_directory)
    items: dict[ItemKey, Item] = {}
    num_bytes = 0
    for key in dict.fromkeys(empty.key_of(*key) for key in _keys_to_show(recordings)):
        part = getattr(splits[key.split], key.part)
        if key not in known.items and key.position >= len(part):  # its data is gone
            continue
        item = known.items.get(key) or _item(part, key.position)
        num_bytes += len(item.picture or b"") + len((item.text or "").encode())
        if num_bytes > MOST_BYTES:
            break
        items[key] = item
    is_shown = any(item.picture or item.text for item in items.values()) or not items
    write_items(run_directory, Items(items, names, shared, None if is_shown else NO_PICTURES))


def _keys_to_show(recordings: Sequence[Recording]) -> Iterator[ItemKey]:
    """The queries that are shown, each with its neighbours in every recording."""
    all_queries = [one.queries for one in recordings if one.queries is not None]
    shown = queries_to_show(recordings)
    for position in (*shown.fallen, *shown.improved):
        for queries in all_queries:
            yield from _keys_of(queries, position)


def _keys_of(queries: RecordedQueries, position: int) -> Iterator[ItemKey]:
    """A query and its neighbours, without those that are no items."""
    if queries.kind == "item":
        yield ItemKey("query", int(queries.split[position]), int(queries.index[position]))
    for neighbours in (queries.learned, queries.now):
        for split, index in zip(neighbours.split[position], neighbours.index[position], strict=True):
            if index >= 0:
                yield ItemKey("gallery", int(split), int(index))


def _item(part: Part, position: int) -> Item:
    """An item as it is shown; without a picture if that cannot be read any more."""
    label = int(part.labels[position])
    try:
        shown = picture_of(part.inputs, position, part.preprocessing)
    except UserError:
        return Item(label)
    if shown is None or isinstance(shown, str):
        return Item(label, text=shown)
    return Item(label, thumbnail_of(shown))


def _label_names(splits: Sequence[Split], recordings: Sequence[Recording]) -> dict[int, str]:
    """The names of the classes that occur in the recordings, where the data set has any."""
    named = splits.label_names if isinstance(splits, SplitSequence) else {}
    names = {label: shortened(name, LONGEST_NAME) for name, labels in named.items() for label in labels}
    occurring: set[int] = set()
    for recording in recordings:
        if recording.classes is not None:
            occurring.update(recording.classes.label.tolist())
        if recording.queries is not None:
            for neighbours in (recording.queries.learned, recording.queries.now):
                occurring.update(neighbours.label.flatten().tolist())
    return {label: name for label, name in names.items() if label in occurring}


def _known_items(run_directory: Path) -> Items:
    try:
        return read_items(run_directory) or Items()
    except UserError:  # damaged; all are made again
        return Items()
