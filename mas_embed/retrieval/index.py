"""A FAISS index that knows whose embeddings it holds: ids, labels and the fingerprint of the model beside the vectors.

G items in the index, Q queries, D embedding size.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.retrieval.faiss_index import (
    empty_vectors,
    faiss_errors,
    moved_vectors,
    read_vectors,
    training_size_needed,
    write_vectors,
)
from mas_embed.retrieval.inputs import ROWS_AT_ONCE, as_embeddings, as_integers, share_in_common, unit_rows
from mas_embed.retrieval.search import import_faiss
from mas_embed.retrieval.similarity import Distance
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import unwrap_compiled

ITEMS_FILE = "items.safetensors"
LARGEST_K_ON_GPU = 2048  # of FAISS's kernels


class Neighbours(NamedTuple):
    """The nearest items of every query, nearest first.

    An approximate index may find fewer than k; what it did not find comes last, and `is_found` tells: a label or an id of -1
    may also be a real one.

    Attributes:
        scores: [Q, k] higher is nearer; -inf where nothing was found.
        ids: [Q, k]; -1 where nothing was found.
        labels: [Q, k]; -1 where nothing was found.
        is_found: [Q, k].
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_found: NDArray[np.bool_]


class RetrievalIndex:
    """Vectors for nearest-neighbour search, with the id and label of each and the fingerprint of the model they are from.

    Made by `build` or `load`. Search and storage are FAISS's, in float32.

    Attributes:
        ids: [G] int64, which item a vector is.
        labels: [G] int64.
        factory: what FAISS's `index_factory` made the index from.
        distance: "cosine", "euclidean" or "inner_product".
        fingerprint: of the model that embedded the items; None if it is not known.
        device: where the vectors are.

    Example:
        >>> model = torch.nn.Identity()
        >>> index = RetrievalIndex.build([[1.0, 0.0], [0.0, 1.0]], [7, 8], fingerprint=model)
        >>> index.search([[2.0, 1.0]], k=1, fingerprint=model).labels
        array([[7]])
    """

    def __init__(
        self,
        vectors: Any,
        ids: Tensor,
        labels: Tensor,
        *,
        factory: str,
        distance: Distance,
        fingerprint: str | None,
        is_mapped: bool = False,
    ) -> None:
        self._vectors, self._is_mapped = vectors, is_mapped
        self._on_cpu: Any = None  # of vectors on a GPU, a copy
        self.ids, self.labels, self.device = ids, labels, torch.device("cpu")
        self.factory, self.distance, self.fingerprint = factory, distance, fingerprint

    @classmethod
    def build(
        cls,
        embeddings: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        *,
        ids: ArrayLike | Tensor | None = None,
        factory: str = "Flat",
        distance: Distance = "cosine",
        fingerprint: nn.Module | str | None = None,
        training_size: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> RetrievalIndex:
        """An index of the given embeddings, trained on them where its kind needs that.

        Args:
            embeddings: [G, D], finite; read in blocks, so that an array mapped from disk may exceed the memory.
            labels: [G] integers.
            ids: [G] integers that tell which item a row is; None: its position.
            factory: what FAISS's `index_factory` understands: "Flat" is exact; "IVF1024,Flat", "HNSW32" and
                "IVF4096,PQ64" are approximate.
            distance: "cosine" (rows are scaled to unit length), "euclidean" or "inner_product".
            fingerprint: the model that embedded the rows, or its `fingerprint_of`; None: not known, and every search has
                to allow other models.
            training_size: at most so many rows, drawn at random, are trained on; None: all.
            seed: of that draw. FAISS's own seeds are constants.
            device: see `to`.

        Raises:
            UserError: shapes that do not fit, embeddings that are not finite (zero under "cosine", too large for float32
                under others), a factory that FAISS cannot make, or too few rows to train it.
        """
        rows = as_embeddings(embeddings, "embeddings")
        vectors = empty_vectors(rows.shape[1], factory, distance)
        needed = training_size_needed(vectors)
        sample = _sample(rows, training_size, seed)
        if not vectors.is_trained and len(sample) < needed:
            raise UserError(
                f"an index '{factory}' needs at least {needed} embeddings to train, got {len(sample)}; "
                "take fewer lists or codes, or 'Flat'"
            )
        none = torch.empty(0, dtype=torch.int64)
        known = _fingerprint(fingerprint)
        index = cls(vectors, none, none, factory=factory, distance=distance, fingerprint=known).to(device)
        if not index._vectors.is_trained:
            with faiss_errors(f"cannot train an index '{factory}'"):
                index._vectors.train(_prepared(sample, distance, "embeddings"))
        index.add(rows, labels, ids)
        return index

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        size = f"{len(self):,} x {self._vectors.d}"
        return f"RetrievalIndex({self.factory}, {size}, {self.distance}, {self.device}, fingerprint={self.fingerprint})"

    def add(
        self, embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor, ids: ArrayLike | Tensor | None = None
    ) -> None:
        """Appends items that the same model embedded; the index is not trained again.

        Args:
            embeddings: [N, D], finite.
            labels: [N] integers.
            ids: [N] integers; None: the positions that they get in the index.

        Raises:
            UserError: as `build`; or the index is mapped from a file. The index is then as it was.
        """
        if self._is_mapped:
            raise UserError("an index that is mapped from a file cannot grow; load it with memory_map=False")
        rows = self._rows(embeddings, "embeddings")
        positions = torch.arange(len(self), len(self) + len(rows))
        new_ids = positions if ids is None else as_integers(ids, "ids", len(rows)).cpu()
        new_labels = as_integers(labels, "labels", len(rows)).cpu()
        for _ in _prepared_blocks(rows, self.distance, "embeddings"):
            pass  # refuses bad rows before the first is added
        for block in _prepared_blocks(rows, self.distance, "embeddings"):
            with faiss_errors(f"cannot add to an index '{self.factory}'"):
                self._vectors.add(block)
        self.ids, self.labels = torch.cat([self.ids, new_ids]), torch.cat([self.labels, new_labels])
        self._on_cpu = None

    def search(
        self,
        queries: ArrayLike | Tensor,
        k: int,
        *,
        fingerprint: nn.Module | str | None = None,
        allow_other_model: bool = False,
    ) -> Neighbours:
        """The k nearest items of every query, as far as this kind of index finds them.

        Args:
            queries: [Q, D], finite.
            k: 1 <= k <= G.
            fingerprint: the model that embedded the queries, or its `fingerprint_of`, which is worth keeping where
                searches are many: taking it reads all parameters.
            allow_other_model: search whatever model the queries are from, known or not.

        Returns:
            Scores (cosine, negative squared distance, or inner product), ids and labels [Q, k], nearest first. Which of
            several items with the same score are among the k is not specified.

        Raises:
            UserError: the queries are from another model than the items, or one of the two is not known; k out of range;
                queries of another size, not finite, or zero under "cosine".
        """
        if not allow_other_model:
            self._check_model(_fingerprint(fingerprint))
        scores, positions = self._nearest(self._rows(queries, "queries"), k)
        is_found = positions >= 0
        ids, labels = (np.where(is_found, tensor.numpy()[positions], -1) for tensor in (self.ids, self.labels))
        return Neighbours(scores, ids, labels, is_found)

    def recall_against_exact(self, queries: ArrayLike | Tensor, gallery: ArrayLike | Tensor, k: int) -> float:
        """The mean share of a query's k exactly nearest items that this index finds among its k; 1 for "Flat".

        Args:
            queries: [Q, D], of the model that embedded the gallery; this is not checked.
            gallery: [G, D], what the index was built from, in the same order.
            k: 1 <= k <= G.

        Returns:
            In [0, 1]. Of items that tie for the last place, those count that the exact search happens to name.

        Raises:
            UserError: as `search`; or the gallery does not have the index's number of items.

        O(Q G D): meant for a sample of the queries.
        """
        rows, items = self._rows(queries, "queries"), self._rows(gallery, "gallery")
        if len(items) != len(self):
            raise UserError(f"the gallery must hold the index's {len(self)} items, got {len(items)}")
        exact = RetrievalIndex.build(items, self.labels, distance=self.distance)
        return share_in_common(exact._nearest(rows, k)[1], self._nearest(rows, k)[1])

    def set_search_parameters(self, parameters: Mapping[str, float]) -> None:
        """Sets what trades speed for recall; kept by `save`.

        Args:
            parameters: by FAISS's names, such as `{"nprobe": 16}` for "IVF" (lists looked at) or `{"efSearch": 64}` for
                "HNSW".

        Raises:
            UserError: the index has no such parameter.
        """
        faiss = import_faiss()
        space = (faiss.ParameterSpace if self.device.type == "cpu" else faiss.GpuParameterSpace)()
        for name, value in parameters.items():
            with faiss_errors(f"cannot set '{name}' of an index '{self.factory}'"):
                space.set_index_parameter(self._vectors, name, float(value))
        self._on_cpu = None

    def to(self, device: str | torch.device) -> RetrievalIndex:
        """The index on a device: itself if it is there already, else a copy of the vectors.

        Args:
            device: "cpu", "cuda" or "cuda:1". There, a k above 2048 is searched for on the CPU, in a copy.

        Raises:
            UserError: FAISS was built without GPU support, there is no such GPU, or this kind of index has no form for it.
        """
        device = torch.device(device)
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved._vectors, moved.device = moved_vectors(self._vectors, device), device
        moved._on_cpu, moved._is_mapped = None, False
        return moved

    def save(self, folder: str | Path) -> None:
        """Writes the index into a folder, which is made if need be: FAISS's own file, and the rest as safetensors.

        An index that was saved there before stays whole until the new one is.

        Raises:
            UserError: the folder that the folder is in does not exist.
        """
        folder = Path(folder)
        if not folder.parent.is_dir():
            raise UserError(f"the folder {folder.parent} does not exist; make it first, to save an index there")
        folder.mkdir(exist_ok=True)
        # Each save has a file of vectors of its own; the items name it, and replacing them is what makes the save
        vectors_file = folder / f"vectors-{uuid.uuid4().hex[:12]}.faiss"
        description = {
            "kind": "retrieval_index",
            "vectors": vectors_file.name,
            "factory": self.factory,
            "distance": self.distance,
            "fingerprint": self.fingerprint,
        }
        try:
            write_vectors(self._cpu_vectors(), vectors_file)
            write_tensors(folder / ITEMS_FILE, {"ids": self.ids, "labels": self.labels}, description)
        except BaseException:
            vectors_file.unlink(missing_ok=True)
            raise
        for other in folder.glob("vectors-*.faiss"):
            if other.name != vectors_file.name:
                other.unlink()

    @classmethod
    def load(
        cls, folder: str | Path, *, memory_map: bool = False, device: str | torch.device = "cpu"
    ) -> RetrievalIndex:
        """Reads what `save` wrote.

        Args:
            folder: that `save` was given.
            memory_map: leave the vectors in their file and read them as they are searched; such an index cannot grow.
            device: see `to`.

        Raises:
            UserError: there is no saved index, its vectors are missing or damaged, or they are not as many as its items.
        """
        tensors, description = read_tensors(Path(folder) / ITEMS_FILE)
        if description.get("kind") != "retrieval_index":
            raise UserError(f"{folder} holds a {description.get('kind')}, not an index that RetrievalIndex.save wrote")
        vectors = read_vectors(Path(folder) / description["vectors"], memory_map=memory_map)
        if vectors.ntotal != len(tensors["ids"]) or vectors.ntotal != len(tensors["labels"]):
            raise UserError(
                f"{folder} has {vectors.ntotal} vectors but {len(tensors['ids'])} ids; save the index again"
            )
        settings = {name: description[name] for name in ("factory", "distance", "fingerprint")}
        return cls(vectors, tensors["ids"], tensors["labels"], **settings, is_mapped=memory_map).to(device)

    def _rows(self, values: ArrayLike | Tensor, name: str) -> Tensor:
        rows = as_embeddings(values, name)
        if rows.shape[1] != self._vectors.d:
            raise UserError(
                f"{name} have {rows.shape[1]} dimensions and the index {self._vectors.d}; embed both with one model"
            )
        return rows

    def _nearest(self, rows: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions [Q, k]; -inf and -1 where fewer are found."""
        if not 1 <= k <= len(self):
            raise UserError(f"k must lie between 1 and the index's size, {len(self)}, got {k}")
        vectors = self._cpu_vectors() if k > LARGEST_K_ON_GPU else self._vectors
        found = [vectors.search(block, k) for block in _prepared_blocks(rows, self.distance, "queries")]
        scores, positions = (np.concatenate(part) for part in zip(*found, strict=True))
        if self.distance == "euclidean":
            scores = -scores
        return np.where(positions < 0, np.float32(-np.inf), scores), positions

    def _check_model(self, fingerprint: str | None) -> None:
        remedy = "or allow_other_model=True if that is intended"
        if self.fingerprint is None:
            raise UserError(f"it is not known which model the index is from; build it with its fingerprint, {remedy}")
        if fingerprint is None:
            raise UserError(
                f"it is not known which model the queries are from; pass the model or its fingerprint, {remedy}"
            )
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the queries are from model {fingerprint} and the index is from model {self.fingerprint}; "
                f"embed both with one model, {remedy}"
            )

    def _cpu_vectors(self) -> Any:
        """The vectors on the CPU; a copy of those on a GPU is kept until they change."""
        if self.device.type == "cpu":
            return self._vectors
        if self._on_cpu is None:
            self._on_cpu = moved_vectors(self._vectors, torch.device("cpu"))
        return self._on_cpu


def _fingerprint(model: nn.Module | str | None) -> str | None:
    return fingerprint_of(unwrap_compiled(model)[0]) if isinstance(model, nn.Module) else model


def _sample(rows: Tensor, size: int | None, seed: int) -> Tensor:
    if size is None or size >= len(rows):
        return rows
    if size < 1:
        raise UserError(f"training_size must be at least 1, got {size}")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]
    return rows[drawn.sort().values.to(rows.device)]


def _prepared_blocks(rows: Tensor, distance: Distance, name: str) -> Iterator[NDArray[np.float32]]:
    for block in rows.split(ROWS_AT_ONCE):
        yield _prepared(block, distance, name)


def _prepared(rows: Tensor, distance: Distance, name: str) -> NDArray[np.float32]:
    """Rows as FAISS takes them; unit rows for cosine."""
    if distance == "cosine":
        rows = unit_rows(rows, name)
    elif float(rows.double().square().sum(1).max()) > torch.finfo(torch.float32).max / 4:
        raise UserError(
            f"{name} contain an embedding whose squares exceed float32, in which FAISS searches; scale all down"
        )
    return np.ascontiguousarray(rows.cpu().float().numpy())
