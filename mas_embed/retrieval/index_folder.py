"""The folder of a saved index: the vectors as a FAISS file; their checksums, the ids, labels and settings as safetensors."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.faiss_index import read_index, write_index
from mas_embed.retrieval.similarity import DISTANCES
from mas_embed.runtime.atomic_files import read_tensors, write_errors_explained, write_tensors
from mas_embed.runtime.checks import shown
from mas_embed.runtime.reading import read_errors_explained

ITEMS_FILE = "items.safetensors"
SETTINGS = ("factory", "distance", "fingerprint")

_VECTORS_FILE = re.compile(r"vectors-[0-9a-f]{12}\.faiss")
_CHECKSUMS = ("vectors", "start_of_vectors")
_START_SIZE = 2**20  # bytes whose checksum is also compared if the file is mapped; they hold the sizes of the index


class SavedItems(NamedTuple):
    """The content of the items file.

    Attributes:
        ids: [G] int64.
        labels: [G] int64.
        settings: the factory, the distance and the fingerprint.
        vectors: the name of the file of vectors.
        checksums: of the file of vectors and of its start; None in a folder that an earlier version saved. The items file has
            a checksum of its own, which `read_tensors` compares.
    """

    ids: Tensor
    labels: Tensor
    settings: dict[str, Any]
    vectors: str
    checksums: dict[str, str] | None


def write_folder(folder: Path, faiss_index: Any, ids: Tensor, labels: Tensor, settings: Mapping[str, Any]) -> None:
    """Writes an index into a folder, which is created if needed. An error leaves the index that is already there as it was.

    Raises:
        UserError: the parent of the folder does not exist, the folder is a file, or it cannot be written.
        RunError: the disk is full.
    """
    _make_folder(folder)
    # Every save writes the vectors to a new file. The items file names it, so replacing the items file completes the save
    vectors = folder / f"vectors-{uuid.uuid4().hex[:12]}.faiss"
    try:
        checksums = {"vectors": write_index(faiss_index, vectors), "start_of_vectors": _checksum_of_start(vectors)}
        description = {"kind": "retrieval_index", "vectors": vectors.name, "checksums": checksums, **settings}
        write_tensors(folder / ITEMS_FILE, {"ids": ids, "labels": labels}, description)
    except BaseException:
        vectors.unlink(missing_ok=True)
        raise
    for other in folder.iterdir():
        if _VECTORS_FILE.fullmatch(other.name) and other.name != vectors.name:
            with suppress(OSError):  # the index is saved whether or not a file that it replaces can be removed
                other.unlink()


def read_folder(folder: Path, *, memory_map: bool) -> tuple[Any, SavedItems]:
    """The FAISS index and the items that `write_folder` wrote, after their checksums were compared.

    Raises:
        UserError: the folder holds no index, or a file is missing or damaged. With `memory_map` only the start of the vectors
            is compared with its checksum.
    """
    items = _read_items(folder)
    vectors = _vectors_of(folder, items)
    if items.checksums is not None:
        _check_vectors(vectors, items.checksums, only_start=memory_map)
    faiss_index = read_index(vectors, items.settings["distance"], memory_map=memory_map)
    if faiss_index.ntotal != len(items.ids):
        raise UserError(f"{folder} has {faiss_index.ntotal} vectors but {len(items.ids)} ids; save the index again")
    return faiss_index, items


def verify_folder(folder: Path) -> None:
    """Raises `UserError` that names the file, unless every file of a saved index agrees with its checksum."""
    items = _read_items(folder)
    if items.checksums is None:
        raise UserError(
            f"{folder} has no checksums, as an earlier version saved it; load and save the index to add them"
        )
    _check_vectors(_vectors_of(folder, items), items.checksums, only_start=False)


def _make_folder(folder: Path) -> None:
    with write_errors_explained(folder):
        if not folder.parent.is_dir():
            raise UserError(f"the folder {folder.parent} does not exist; make it first, to save an index there")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"cannot save an index into {folder}: it is a file, not a folder; name another folder")
        folder.mkdir(exist_ok=True)


def _read_items(folder: Path) -> SavedItems:
    """The content of the items file, checked."""
    path = folder / ITEMS_FILE
    tensors, description = read_tensors(path)
    if description.get("kind") != "retrieval_index":
        raise UserError(f"{folder} holds {shown(description.get('kind'))}, not an index that RetrievalIndex.save wrote")
    problem = _problem_of(tensors, description)
    if problem is not None:
        raise UserError(f"{path} is damaged: {problem}; save the index again")
    settings = {name: description[name] for name in SETTINGS}
    return SavedItems(tensors["ids"], tensors["labels"], settings, description["vectors"], description.get("checksums"))


def _problem_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str | None:
    """The reason why tensors and description are not those of an index; None if they can be."""
    for name in ("ids", "labels"):
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.int64 or tensor.ndim != 1:
            return f"it has no int64 tensor '{name}' of shape [G]"
    if len(tensors["ids"]) != len(tensors["labels"]):
        return f"it has {len(tensors['ids'])} ids but {len(tensors['labels'])} labels"
    checksums = description.get("checksums")
    is_valid = {
        "vectors": _VECTORS_FILE.fullmatch(str(description.get("vectors"))),
        "factory": isinstance(description.get("factory"), str),
        "distance": description.get("distance") in list(DISTANCES),
        "fingerprint": isinstance(description.get("fingerprint", 0), str | None),
        "checksums": checksums is None or (isinstance(checksums, dict) and checksums.keys() == set(_CHECKSUMS)),
    }
    wrong = [name for name, valid in is_valid.items() if not valid]
    return f"'{wrong[0]}' in its description is missing or not valid" if wrong else None


def _vectors_of(folder: Path, items: SavedItems) -> Path:
    """The file of vectors; raises `UserError` if it is missing, or is a link to a file outside of the folder."""
    vectors = folder / items.vectors
    with read_errors_explained(vectors, "the vectors of the index"):
        is_file, is_inside = vectors.is_file(), vectors.resolve().parent == folder.resolve()
    if not is_file:
        raise UserError(f"the vectors of the index are missing: there is no file {vectors}")
    if not is_inside:
        raise UserError(
            f"the vectors of the index, {vectors}, are a link that leads out of the folder; copy the file there"
        )
    return vectors


def _check_vectors(vectors: Path, checksums: Mapping[str, str], *, only_start: bool) -> None:
    """Raises `UserError` if the file of vectors, or its start, is not the one whose checksum was stored."""
    with read_errors_explained(vectors, "the vectors of the index"):
        if only_start:
            is_unchanged = _checksum_of_start(vectors) == checksums["start_of_vectors"]
        else:
            with vectors.open("rb") as file:
                is_unchanged = hashlib.file_digest(file, "sha256").hexdigest() == checksums["vectors"]
    if not is_unchanged:
        raise UserError(f"{vectors} is damaged: it has changed since the index was saved; save the index again")


def _checksum_of_start(path: Path) -> str:
    """The SHA-256 of the size and the first bytes of a file."""
    with path.open("rb") as file:
        start = file.read(_START_SIZE)
    return hashlib.sha256(f"{path.stat().st_size} ".encode() + start).hexdigest()
