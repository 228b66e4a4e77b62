"""The items that a report can show: their pictures or texts, and the names of the classes, in one file of a run directory."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from mas_embed.errors import UserError
from mas_embed.runtime.atomic_files import read_tensors, write_tensors

ITEMS_FILE = "items.safetensors"
VERSION = 1
PNG_START = b"\x89PNG"

PartOfItem = Literal["query", "gallery"]


class ItemKey(NamedTuple):
    """Where an item is: its position in the queries or the gallery of a split."""

    part: PartOfItem
    split: int
    position: int


@dataclass(frozen=True)
class Item:
    """An item as it is shown.

    Attributes:
        label: its class.
        picture: a PNG or JPEG file; None for an item that is no picture, or whose picture is left out.
        text: None for an item that is no text.
    """

    label: int
    picture: bytes | None = None
    text: str | None = None

    @property
    def media_type(self) -> str:
        """Of the picture; empty without one."""
        if self.picture is None:
            return ""
        return "image/png" if self.picture.startswith(PNG_START) else "image/jpeg"

    @property
    def data_uri(self) -> str:
        """The picture as the source of an image in a page; empty without one."""
        if self.picture is None:
            return ""
        return f"data:{self.media_type};base64,{base64.b64encode(self.picture).decode()}"


@dataclass(frozen=True)
class Items:
    """The items that can be shown, and the names of their classes.

    Attributes:
        items: by part, split and position.
        label_names: by class its name, where it has one.
        shared_parts: the splits whose queries are their gallery, of which only gallery items are in `items`.
        note: a sentence that says why nothing can be shown; None if something can.
    """

    items: dict[ItemKey, Item] = field(default_factory=dict)
    label_names: dict[int, str] = field(default_factory=dict)
    shared_parts: frozenset[int] = frozenset()
    note: str | None = None

    def name_of(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        return self.label_names.get(int(label), str(int(label)))

    def key_of(self, part: PartOfItem, split: int, index: int) -> ItemKey:
        """The key of an item in `items`."""
        return ItemKey("gallery" if split in self.shared_parts else part, int(split), int(index))

    def get(self, part: PartOfItem, split: int, index: int) -> Item | None:
        """An item by its part, split and position; None if it is not stored."""
        return self.items.get(self.key_of(part, split, index))


def write_items(run_directory: Path, items: Items) -> None:
    """Writes the items into a run directory, atomically."""
    keys = list(items.items)
    pictures = [item.picture or b"" for item in items.items.values()]
    tensors = {
        "is_query": torch.tensor([key.part == "query" for key in keys], dtype=torch.bool),
        "split": torch.tensor([key.split for key in keys], dtype=torch.int32),
        "index": torch.tensor([key.position for key in keys], dtype=torch.int32),
        "label": torch.tensor([item.label for item in items.items.values()], dtype=torch.int64),
        "picture_sizes": torch.tensor([len(picture) for picture in pictures], dtype=torch.int64),
        "pictures": torch.from_numpy(np.frombuffer(b"".join(pictures) or b"\0", np.uint8).copy()),
    }
    described = {
        "kind": "items",
        "version": VERSION,
        "texts": [item.text for item in items.items.values()],
        "label_names": {str(label): name for label, name in items.label_names.items()},
        "shared_parts": sorted(items.shared_parts),
        "note": items.note,
    }
    write_tensors(run_directory / ITEMS_FILE, tensors, described)


def read_items(run_directory: str | Path) -> Items | None:
    """The items of a run directory; None if there are none, as in those of earlier versions.

    Raises:
        UserError: the file is damaged, or a newer version wrote it.
    """
    path = Path(run_directory) / ITEMS_FILE
    if not path.exists():
        return None
    tensors, described = read_tensors(path)
    version = described.get("version")
    if described.get("kind") == "items" and isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} was written by a newer version of mas-embed; update mas-embed to read it")
    try:
        return _items_of({name: tensor.numpy() for name, tensor in tensors.items()}, described)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} does not hold the items of a run; it is damaged, so remove it") from None


def _items_of(arrays: Mapping[str, np.ndarray], described: Mapping[str, object]) -> Items:
    content, ends = arrays["pictures"].tobytes(), np.cumsum(arrays["picture_sizes"]).tolist()
    columns = [arrays[name].tolist() for name in ("is_query", "split", "index", "label", "picture_sizes")]
    texts, names, shared = (described[name] for name in ("texts", "label_names", "shared_parts"))
    if not isinstance(texts, list) or not isinstance(names, dict) or not isinstance(shared, list):
        raise ValueError("not the items of a run")
    items = {
        ItemKey("query" if is_query else "gallery", split, index): Item(label, content[end - size : end] or None, text)
        for is_query, split, index, label, size, end, text in zip(*columns, ends, texts, strict=True)
    }
    note = described.get("note")
    return Items(
        items,
        {int(label): str(name) for label, name in names.items()},
        frozenset(int(split) for split in shared),
        None if note is None else str(note),
    )
