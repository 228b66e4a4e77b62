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
    if not 1 <= k <= len(gallery):
        raise UserError(f"k must lie between 1 and the gallery's size, {len(gallery)}, got {k}")
    return search_prepared(*comparable(queries, gallery, distance), k, distance)


def search_prepared(
    queries: Tensor, gallery: Tensor, k: int, distance: Distance
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`find_nearest` for what `comparable` has prepared."""
    faiss = import_faiss()
    if distance == "euclidean":
        # The same distances, and float32 keeps more of their digits
        centre = gallery.mean(0)
        queries, gallery = queries - centre, gallery - centre
    index = (faiss.IndexFlatL2 if distance == "euclidean" else faiss.IndexFlatIP)(gallery.shape[1])
    index.add(_float32(gallery))
    scores, positions = index.search(_float32(queries), k)
    if (positions < 0).any():  # FAISS's "nothing found", which would index the last label
        raise RuntimeError("FAISS found fewer neighbours than there are")
    return (-scores if distance == "euclidean" else scores), positions


def comparable(queries: Tensor, gallery: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """Queries and gallery in float64, prepared for the distance, with the same ranking and numbers of moderate size.

    Unit rows for cosine; for the others both are divided by a power of two, which rounds nothing.

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
    queries, gallery = queries.double(), gallery.double()
    if distance == "cosine":
        return _unit_rows(queries), _unit_rows(gallery)
    if distance == "inner_product":
        return queries / _power_of_two(queries), gallery / _power_of_two(gallery)
    if distance == "euclidean":
        scale = torch.maximum(_power_of_two(queries), _power_of_two(gallery))
        return queries / scale, gallery / scale
    raise UserError(f"distance must be one of {', '.join(DISTANCES)}, got '{distance}'")


def _unit_rows(rows: Tensor) -> Tensor:
    rows = rows / rows.abs().amax(1, keepdim=True)  # so that no square overflows or vanishes
    return rows / rows.norm(dim=1, keepdim=True)


def _power_of_two(rows: Tensor) -> Tensor:
    """A power of two near the largest absolute value; 1 if all are zero."""
    largest = rows.abs().amax()
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))


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
