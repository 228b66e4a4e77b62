"""Nearest-neighbour search by FAISS, which no other module imports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch  # must precede FAISS: the reverse order can crash if their CUDA versions differ
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.similarity import Distance, Rows, lazy_rows, mean_of_rows
from mas_embed.runtime.checks import as_whole_number

BYTES_AT_ONCE = 2**26  # of gallery items in float32, so that a gallery mapped from a file is never in memory as a whole


def find_nearest(
    queries: Tensor, gallery: Tensor, k: int, *, distance: Distance = "cosine"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The scores and positions of the k nearest gallery items of every query, by exhaustive search in float32.

    Args:
        queries: [Q, D], finite.
        gallery: [G, D], finite.
        k: 1 <= k <= G.
        distance: "cosine" (rows are scaled to unit length), "euclidean" or "inner_product".

    Returns:
        Scores [Q, k] and gallery positions [Q, k], nearest first. A higher score is nearer; under "euclidean" the score is
        the negative squared distance. Scores may be scaled by a positive constant, the same for all queries and items. If
        items tie for the k-th rank, it is not specified which of them are returned.

    Raises:
        UserError: k is out of range, a value is not finite, or a row is zero under "cosine".
    """
    queries, gallery = as_embeddings(queries, "queries"), as_embeddings(gallery, "gallery")
    k = as_whole_number("k", k)
    if not 1 <= k <= len(gallery):
        raise UserError(f"k must lie between 1 and the gallery's size, {len(gallery)}, got {k}")
    faiss = import_faiss()
    rows, items = lazy_rows(queries, gallery, distance)
    # Centring does not change distances, and reduces their rounding errors in float32
    centre = mean_of_rows(items, range(len(items))) if distance == "euclidean" else None
    query_rows = _as_float32(rows[:], centre)
    metric = faiss.METRIC_L2 if distance == "euclidean" else faiss.METRIC_INNER_PRODUCT
    size = max(1, BYTES_AT_ONCE // (4 * items.num_dimensions))
    found: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = []
    for start in range(0, len(items), size):
        part = _as_float32(items[start : min(start + size, len(items))], centre)
        scores, positions = faiss.knn(query_rows, part, min(k, len(part)), metric=metric)
        found = [_nearest_of([*found, (-scores if distance == "euclidean" else scores, positions + start)], k)]
    scores, positions = found[0]
    if scores.shape[1] < k or (positions < 0).any():  # -1 would index the last item
        raise RuntimeError(f"FAISS found fewer than {k} neighbours for a query")
    return scores, positions


def _nearest_of(
    found: list[tuple[NDArray[np.float32], NDArray[np.int64]]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k highest scores of each query, and their positions, among those of parts of the gallery."""
    if len(found) == 1:
        return found[0]
    scores, positions = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)


def _as_float32(rows: Rows, centre: Tensor | None) -> NDArray[np.float32]:
    """The rows as FAISS takes them: scaled to unit length under "cosine", centred under "euclidean"."""
    values = rows.values / rows.divisor.unsqueeze(1) if centre is None else rows.values - centre
    return np.ascontiguousarray(values.detach().cpu().float().numpy())


def import_faiss() -> Any:
    """The module `faiss`, set to use as many threads as PyTorch; raises `UserError` if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"FAISS cannot be imported ({error}); install exactly one of faiss-gpu and faiss-cpu, >= 1.14.3"
        ) from None
    # Two thread pools on the same cores slow each other down, so FAISS must not use more threads than PyTorch
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
