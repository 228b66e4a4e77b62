"""Nearest-neighbour search by FAISS, which no other module imports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch  # must precede FAISS: the reverse order can crash if their CUDA versions differ
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.similarity import Distance, prepare_rows
from mas_embed.runtime.checks import as_whole_number


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
    queries, gallery = (rows.values / rows.divisor.unsqueeze(1) for rows in prepare_rows(queries, gallery, distance))
    if distance == "euclidean":
        # Centring does not change distances, and reduces their rounding errors in float32
        centre = gallery.mean(0)
        queries, gallery = queries - centre, gallery - centre
    index = (faiss.IndexFlatL2 if distance == "euclidean" else faiss.IndexFlatIP)(gallery.shape[1])
    index.add(_as_float32(gallery))
    scores, positions = index.search(_as_float32(queries), k)
    if (positions < 0).any():  # FAISS returns -1 for a missing neighbour, and -1 would index the last item
        raise RuntimeError(f"FAISS found fewer than {k} neighbours for a query")
    return (-scores if distance == "euclidean" else scores), positions


def _as_float32(rows: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows.detach().cpu().float().numpy())


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
