"""Nearest neighbours by FAISS; the only module that imports it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch  # before FAISS: the other way round can crash where their CUDA versions differ
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.similarity import Distance, prepare_rows


def find_nearest(
    queries: Tensor, gallery: Tensor, k: int, *, distance: Distance = "cosine"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest gallery items of every query, by exhaustive search in float32, nearest first.

    Args:
        queries: [Q, D], finite.
        gallery: [G, D], finite.
        k: 1 <= k <= G.
        distance: "cosine" (rows are scaled to unit length), "euclidean" or "inner_product".

    Returns:
        Scores [Q, k], higher is nearer (for "euclidean" the negative squared distance), and gallery positions [Q, k].
        Which of several items with the same score are among the k is not specified.

    Raises:
        UserError: k is out of range, a value is not finite, or a row is zero under "cosine".
    """
    queries, gallery = as_embeddings(queries, "queries"), as_embeddings(gallery, "gallery")
    if not 1 <= k <= len(gallery):
        raise UserError(f"k must lie between 1 and the gallery's size, {len(gallery)}, got {k}")
    faiss = import_faiss()
    asked, searched = (rows.values / rows.divisor.unsqueeze(1) for rows in prepare_rows(queries, gallery, distance))
    if distance == "euclidean":
        # The same distances, and float32 keeps more of their digits
        centre = searched.mean(0)
        asked, searched = asked - centre, searched - centre
    index = (faiss.IndexFlatL2 if distance == "euclidean" else faiss.IndexFlatIP)(searched.shape[1])
    index.add(_float32(searched))
    scores, positions = index.search(_float32(asked), k)
    if (positions < 0).any():  # FAISS's "nothing found", which would index the last label
        raise RuntimeError("FAISS found fewer neighbours than there are")
    return (-scores if distance == "euclidean" else scores), positions


def _float32(rows: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows.detach().cpu().float().numpy())


def import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"FAISS cannot be imported ({error}); install exactly one of faiss-gpu and faiss-cpu, >= 1.14.3"
        ) from None
    # Two thread pools on the same cores slow each other down: FAISS gets what torch has.
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
