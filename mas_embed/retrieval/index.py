"""A FAISS index that stores, beside the vectors, the items' ids and labels and the fingerprint of the embedding model.

G items in the index, Q queries, D embedding size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.retrieval.faiss_index import (
    as_search_parameter,
    empty_index,
    faiss_errors_as_user_errors,
    index_on_device,
    min_training_size,
)
from mas_embed.retrieval.index_folder import read_folder, verify_folder, write_folder
from mas_embed.retrieval.inputs import ROWS_AT_ONCE, as_embeddings, share_in_common, unit_rows
from mas_embed.retrieval.search import import_faiss
from mas_embed.retrieval.similarity import Distance
from mas_embed.runtime.arrays import as_integers
from mas_embed.runtime.checks import as_whole_number, shown
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import unwrap_compiled
from mas_embed.runtime.seeding import LARGEST_SEED

LARGEST_K_ON_GPU = 2048  # the limit of FAISS's GPU kernels


class Neighbours(NamedTuple):
    """The nearest items of every query, nearest first.

    An approximate index may find fewer than k items for a query; the rest of its row is then padding. Use `is_found` to detect
    the padding, because -1 may also be the label or id of an item.

    Attributes:
        scores: [Q, k] a higher score is nearer; padded with -inf.
        ids: [Q, k] padded with -1.
        labels: [Q, k] padded with -1.
        is_found: [Q, k] False for padding.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_found: NDArray[np.bool_]


class RetrievalIndex:
    """A nearest-neighbour index of embeddings, with the items' ids and labels and the fingerprint of the embedding model.

    Create it by `build` or `load`. FAISS stores and searches the vectors, in float32.

    Attributes:
        ids: [G] int64 identifiers of the items.
        labels: [G] int64 labels of the items.
        factory: the description of the index, in the notation of FAISS's `index_factory`.
        distance: "cosine", "euclidean" or "inner_product".
        fingerprint: the fingerprint of the model that embedded the items; None if it is not known.
        device: the device of the vectors.

    Examples:
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
        self._faiss_index, self._is_mapped = vectors, is_mapped
        self._cpu_copy: Any = None  # a copy of an index that is on a GPU
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
        """An index of the given embeddings, trained on them if the factory describes an index that needs training.

        Args:
            embeddings: [G, D], finite; read in blocks, so an array mapped from disk may be larger than the memory.
            labels: [G] integers.
            ids: [G] integers that identify the items; None: the positions of the rows.
            factory: a description for FAISS's `index_factory`. "Flat" is exact; "IVF1024,Flat", "HNSW32" and
                "IVF4096,PQ64" are approximate.
            distance: "cosine" (rows are scaled to unit length), "euclidean" or "inner_product".
            fingerprint: the model that embedded the rows, or its `fingerprint_of`. None if it is not known; every search
                must then pass `allow_other_model=True`.
            training_size: the number of rows, drawn at random, that the index is trained on; None: all rows.
            seed: seed of that draw. The seeds that FAISS uses in training are constants.
            device: see `to`.

        Raises:
            UserError: shapes do not match, an embedding is not finite (or is zero under "cosine", or too long for float32
                under another distance), FAISS cannot create the index, or there are too few rows to train it.
        """
        rows = as_embeddings(embeddings, "embeddings")
        faiss_index = empty_index(rows.shape[1], factory, distance)
        min_size = min_training_size(faiss_index)
        sample = _training_sample(rows, training_size, seed)
        if not faiss_index.is_trained and len(sample) < min_size:
            raise UserError(
                f"an index '{factory}' needs at least {min_size} embeddings to train, got {len(sample)}; "
                "use fewer lists or codes, or 'Flat'"
            )
        empty = torch.empty(0, dtype=torch.int64)
        fingerprint = _as_fingerprint(fingerprint)
        index = cls(faiss_index, empty, empty, factory=factory, distance=distance, fingerprint=fingerprint).to(device)
        if not index._faiss_index.is_trained:
            with faiss_errors_as_user_errors(f"cannot train an index '{factory}'"):
                index._faiss_index.train(_as_float32(sample, distance, "embeddings"))
        index.add(rows, labels, ids)
        return index

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        size = f"{len(self):,} x {self._faiss_index.d}"
        return f"RetrievalIndex({self.factory}, {size}, {self.distance}, {self.device}, fingerprint={self.fingerprint})"

    def add(
        self, embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor, ids: ArrayLike | Tensor | None = None
    ) -> None:
        """Appends items, which must be embedded by the model that embedded the index; does not train the index again.

        Args:
            embeddings: [N, D], finite.
            labels: [N] integers.
            ids: [N] integers that identify the items; None: their positions in the index.

        Raises:
            UserError: the index is mapped from a file, or the arguments are not valid for `build`. The index does not
                change in this case.
        """
        if self._is_mapped:
            raise UserError("an index that is mapped from a file cannot grow; load it with memory_map=False")
        rows = self._as_rows(embeddings, "embeddings")
        positions = torch.arange(len(self), len(self) + len(rows))
        new_ids = positions if ids is None else as_integers(ids, "ids", len(rows)).cpu()
        new_labels = as_integers(labels, "labels", len(rows)).cpu()
        for _ in _float32_blocks(rows, self.distance, "embeddings"):
            pass  # raises on invalid rows before any row is added
        for block in _float32_blocks(rows, self.distance, "embeddings"):
            with faiss_errors_as_user_errors(f"cannot add to an index '{self.factory}'"):
                self._faiss_index.add(block)
        self.ids, self.labels = torch.cat([self.ids, new_ids]), torch.cat([self.labels, new_labels])
        self._cpu_copy = None

    def search(
        self,
        queries: ArrayLike | Tensor,
        k: int,
        *,
        fingerprint: nn.Module | str | None = None,
        allow_other_model: bool = False,
    ) -> Neighbours:
        """The k nearest items of every query; an approximate index may miss some of them.

        Args:
            queries: [Q, D], finite.
            k: the number of items, 1 <= k <= G.
            fingerprint: the model that embedded the queries, or its `fingerprint_of`. Computing a fingerprint reads all
                parameters, so compute it once if you search often.
            allow_other_model: search even if the queries are from a model that is unknown or differs from the index's model.

        Returns:
            Scores (cosine, negative squared distance, or inner product), ids and labels [Q, k], nearest first. If items
            tie for the k-th rank, it is not specified which of them are returned.

        Raises:
            UserError: the queries and the index are from different models, or one of the models is not known; `k` is out of
                range; or the queries differ in size from the index, are not finite, or are zero under "cosine".
        """
        if not allow_other_model:
            self._check_model(_as_fingerprint(fingerprint))
        scores, positions = self._nearest(self._as_rows(queries, "queries"), k)
        is_found = positions >= 0
        ids, labels = (np.where(is_found, tensor.numpy()[positions], -1) for tensor in (self.ids, self.labels))
        return Neighbours(scores, ids, labels, is_found)

    def recall_against_exact(self, queries: ArrayLike | Tensor, gallery: ArrayLike | Tensor, k: int) -> float:
        """Recall at k: the mean share of a query's k exact nearest items that this index finds; 1 for "Flat".

        Args:
            queries: [Q, D], embedded by the model that embedded the gallery; this is not checked.
            gallery: [G, D], the embeddings that the index holds, in the same order.
            k: the number of items, 1 <= k <= G.

        Returns:
            A number in [0, 1]. If items tie for the k-th rank, only those that the exact search returns count.

        Raises:
            UserError: the gallery and the index differ in their number of items, or `search` refuses the arguments.

        Takes O(Q G D), so a sample of the queries is recommended.
        """
        rows, items = self._as_rows(queries, "queries"), self._as_rows(gallery, "gallery")
        if len(items) != len(self):
            raise UserError(f"the gallery must hold the index's {len(self)} items, got {len(items)}")
        exact = RetrievalIndex.build(items, self.labels, distance=self.distance)
        return share_in_common(exact._nearest(rows, k)[1], self._nearest(rows, k)[1])

    def set_search_parameters(self, parameters: Mapping[str, float]) -> None:
        """Sets FAISS's search parameters, which trade speed for recall; `save` stores them.

        Args:
            parameters: values by FAISS's names, such as `{"nprobe": 16}` (the number of lists that are searched) for "IVF"
                or `{"efSearch": 64}` for "HNSW".

        Raises:
            UserError: the index does not have a parameter of that name, or a value is not a whole number from 1 to 2^20 (0
                switches "ht" and "max_codes" off; "k_factor_rf" may be a fraction). The values before it are set.
        """
        if not isinstance(parameters, Mapping):
            raise UserError(f"parameters must be a mapping from name to value, got {type(parameters).__name__}")
        values = {name: as_search_parameter(name, value) for name, value in parameters.items()}
        faiss = import_faiss()
        space = (faiss.ParameterSpace if self.device.type == "cpu" else faiss.GpuParameterSpace)()
        for name, value in values.items():
            with faiss_errors_as_user_errors(f"cannot set '{name}' of an index '{self.factory}'"):
                space.set_index_parameter(self._faiss_index, name, value)
        self._cpu_copy = None

    def to(self, device: str | torch.device) -> RetrievalIndex:
        """The index on a device: the same object if it is already on that device, else a copy.

        Args:
            device: "cpu", "cuda" or, for example, "cuda:1". On a GPU, searches with k above 2048 use a copy on the CPU.

        Raises:
            UserError: FAISS was built without GPU support, the GPU does not exist, or FAISS has no GPU version of the index.
        """
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise UserError(f"device must be 'cpu' or, for example, 'cuda' or 'cuda:1', got {shown(device)}") from None
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved._faiss_index, moved.device = index_on_device(self._faiss_index, device), device
        moved._cpu_copy, moved._is_mapped = None, False
        return moved

    def save(self, folder: str | Path) -> None:
        """Writes the index into a folder, which is created if needed: the vectors as a FAISS file, the rest as safetensors.

        An index that is already saved in the folder is replaced only after the new one is written completely.

        Raises:
            UserError: the parent of the folder does not exist, the folder is a file, or it cannot be written.
            RunError: the disk is full.
        """
        settings = {"factory": self.factory, "distance": self.distance, "fingerprint": self.fingerprint}
        write_folder(Path(folder), self._faiss_index_on_cpu(), self.ids, self.labels, settings)

    @staticmethod
    def verify(folder: str | Path) -> None:
        """Reads all files of a saved index and compares them with the checksums (SHA-256) that `save` stored.

        `load` does the same, except for the vectors of an index that is mapped from its file.

        Raises:
            UserError: a file is missing or damaged, and is named; or the index was saved by a version without checksums.

        Takes about a second for each GiB.
        """
        verify_folder(Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, *, memory_map: bool = False, device: str | torch.device = "cpu"
    ) -> RetrievalIndex:
        """The index that `save` wrote into a folder.

        Args:
            folder: the folder that was passed to `save`.
            memory_map: map the file of vectors instead of reading it into memory; such an index cannot grow. The checksum of
                the vectors is then compared for the first MiB only, as reading the whole file would defeat the purpose; see
                `verify`.
            device: see `to`.

        Raises:
            UserError: the folder holds no index, or a file of it is missing or damaged.
        """
        faiss_index, items = read_folder(Path(folder), memory_map=memory_map)
        return cls(faiss_index, items.ids, items.labels, **items.settings, is_mapped=memory_map).to(device)

    def _as_rows(self, values: ArrayLike | Tensor, name: str) -> Tensor:
        """The embeddings [N, D] as a tensor; raises `UserError` if D is not that of the index."""
        rows = as_embeddings(values, name)
        if rows.shape[1] != self._faiss_index.d:
            raise UserError(
                f"{name} have {rows.shape[1]} dimensions and the index {self._faiss_index.d}; embed both with one model"
            )
        return rows

    def _nearest(self, rows: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions [Q, k] of the nearest items, padded with -inf and -1."""
        k = as_whole_number("k", k)
        if not 1 <= k <= len(self):
            raise UserError(f"k must lie between 1 and the index's size, {len(self)}, got {k}")
        faiss_index = self._faiss_index_on_cpu() if k > LARGEST_K_ON_GPU else self._faiss_index
        with faiss_errors_as_user_errors(f"cannot search an index '{self.factory}'"):
            results = [faiss_index.search(block, k) for block in _float32_blocks(rows, self.distance, "queries")]
        scores, positions = (np.concatenate(blocks) for blocks in zip(*results, strict=True))
        if self.distance == "euclidean":
            scores = -scores
        return np.where(positions < 0, np.float32(-np.inf), scores), positions

    def _check_model(self, fingerprint: str | None) -> None:
        """Raises `UserError` if the queries' model is not the model of the index, or if one of them is not known."""
        remedy = "or pass allow_other_model=True if that is intended"
        if self.fingerprint is None:
            raise UserError(
                f"it is not known which model the index is from; build it with the model's fingerprint, {remedy}"
            )
        if fingerprint is None:
            raise UserError(
                f"it is not known which model the queries are from; pass the model or its fingerprint, {remedy}"
            )
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the queries are from model {fingerprint} and the index is from model {self.fingerprint}; "
                f"embed both with one model, {remedy}"
            )

    def _faiss_index_on_cpu(self) -> Any:
        """The FAISS index on the CPU. The copy of an index on a GPU is cached until the index changes."""
        if self.device.type == "cpu":
            return self._faiss_index
        if self._cpu_copy is None:
            self._cpu_copy = index_on_device(self._faiss_index, torch.device("cpu"))
        return self._cpu_copy


def _as_fingerprint(model: nn.Module | str | None) -> str | None:
    """The fingerprint of a model, compiled or not; a fingerprint or None is returned unchanged."""
    if not isinstance(model, nn.Module | str | None):
        raise UserError(f"fingerprint must be a model or its fingerprint, got an object of type {type(model).__name__}")
    return fingerprint_of(unwrap_compiled(model)[0]) if isinstance(model, nn.Module) else model


def _training_sample(rows: Tensor, size: int | None, seed: int) -> Tensor:
    """A random sample of the rows, in their order, of at most the given size; all rows if the size is None."""
    seed = as_whole_number("seed", seed, 0, LARGEST_SEED)
    if size is None or as_whole_number("training_size", size, 1) >= len(rows):
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]
    return rows[drawn.sort().values.to(rows.device)]


def _float32_blocks(rows: Tensor, distance: Distance, name: str) -> Iterator[NDArray[np.float32]]:
    """The rows in blocks, each converted by `_as_float32`."""
    for block in rows.split(ROWS_AT_ONCE):
        yield _as_float32(block, distance, name)


def _as_float32(rows: Tensor, distance: Distance, name: str) -> NDArray[np.float32]:
    """The rows as a float32 array for FAISS, scaled to unit length under "cosine"."""
    if distance == "cosine":
        rows = unit_rows(rows, name)
    elif float(rows.double().square().sum(1).max()) > torch.finfo(torch.float32).max / 4:
        raise UserError(
            f"{name} contain an embedding whose squared length exceeds the range of float32, which FAISS uses; "
            "divide all embeddings by a constant"
        )
    return np.ascontiguousarray(rows.cpu().float().numpy())
