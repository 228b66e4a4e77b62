"""Nearest neighbours by FAISS; the only module that imports it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch  # before FAISS: the other way round can crash where their CUDA versions differ
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError

Distance = Literal["cosine", "euclidean", "inner_product"]
DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean", "inner_product")


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
    """
    faiss = _import_faiss()
    if not 1 <= k <= len(gallery):
        raise UserError(f"k must lie between 1 and the gallery's size, {len(gallery)}, got {k}")
    prepared_queries, prepared_gallery = comparable(queries, gallery, distance)
    index = (faiss.IndexFlatL2 if distance == "euclidean" else faiss.IndexFlatIP)(gallery.shape[1])
    index.add(_float32(prepared_gallery))
    scores, positions = index.search(_float32(prepared_queries), k)
    if (positions < 0).any() or not np.isfinite(
        scores
    ).all():  # FAISS's "nothing found", which would index the last label
        raise UserError("FAISS found too few neighbours: some distances overflow float32; scale the embeddings down")
    return (-scores if distance == "euclidean" else scores), positions


def comparable(queries: Tensor, gallery: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Queries and gallery, prepared for the distance: unit rows for cosine, centred ones for Euclidean distance.

    Raises:
        UserError: a value is not finite, or a row is zero under "cosine".
    """
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if not bool(rows.isfinite().all()):
            raise UserError(f"{name} contain NaN or infinite embeddings")
        if distance == "cosine" and bool((rows == 0).all(1).any()):
            raise UserError(
                f"{name} contain an all-zero embedding, which has no cosine; use distance='euclidean' or 'inner_product'"
            )
    if distance == "cosine":
        return queries / queries.norm(dim=1, keepdim=True), gallery / gallery.norm(dim=1, keepdim=True)
    if distance == "euclidean":
        # Distances do not change when both are shifted, and squares of small numbers lose fewer digits
        centre = _coarse_mean(gallery.double())
        return (queries.double() - centre).to(queries.dtype), (gallery.double() - centre).to(gallery.dtype)
    if distance == "inner_product":
        return queries, gallery
    raise UserError(f"distance must be one of {', '.join(DISTANCES)}, got '{distance}'")


def _coarse_mean(rows: Tensor) -> Tensor:
    """The mean row to 8 binary digits of the largest value: subtracting it from integers rounds nothing, ties stay ties."""
    largest = rows.abs().max()
    step = 2 ** (torch.floor(torch.log2(largest)) - 8) if largest > 0 else torch.ones_like(largest)
    return (rows.mean(0) / step).round() * step


def _float32(rows: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows.detach().cpu().float().numpy())


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"FAISS cannot be imported ({error}); install exactly one of faiss-gpu and faiss-cpu, >= 1.14.3"
        ) from None
    # Two thread pools on the same cores slow each other down: FAISS gets what torch has.
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
