"""Checks and conversions of embeddings that users pass, and small functions on embeddings and neighbours."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.arrays import as_tensor

ROWS_AT_ONCE = 2**16  # read from an array at once, so that an array mapped from disk is never in memory as a whole
PAIRS_AT_ONCE = 2**22  # pairs of neighbours that are compared at once


def as_embeddings(values: ArrayLike | Tensor, name: str) -> Tensor:
    """The embeddings [N, D] as a tensor, which shares memory with `values` if possible; `name` is used in errors.

    Raises:
        UserError: the values are not real numbers of shape [N, D], N is 0, or a value is NaN or infinite.
    """
    rows = as_tensor(values, name)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_complex() or rows.dtype == torch.bool:
        raise UserError(f"{name} must be real numbers of shape [N, D], got {rows.dtype} of shape {list(rows.shape)}")
    if len(rows) == 0:
        raise UserError(f"{name} must hold at least one embedding, got none")
    if not all(bool(block.isfinite().all()) for block in rows.split(ROWS_AT_ONCE)):
        raise UserError(f"{name} contain NaN or infinite embeddings")
    return rows


def unit_rows(rows: Tensor, name: str) -> Tensor:
    """The rows [N, D] scaled to unit length, in float64; `name` is used in errors.

    Raises:
        UserError: a row is zero.
    """
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    if bool((largest == 0).any()):
        raise UserError(
            f"{name} contain an all-zero embedding, which has no cosine; use distance='euclidean' or 'inner_product'"
        )
    rows = rows / largest  # so that no square overflows or underflows
    return rows / rows.norm(dim=1, keepdim=True)


def share_in_common(neighbours: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """The mean over queries of the share of `neighbours` [Q, k] that are also in `others` [Q, k], in any order.

    Both hold the positions of gallery items. A row must not contain a position twice.
    """
    num_queries, k = neighbours.shape
    size = max(1, PAIRS_AT_ONCE // k**2)
    blocks = (slice(start, start + size) for start in range(0, num_queries, size))
    in_common = sum(int((neighbours[block, :, None] == others[block, None, :]).sum()) for block in blocks)
    return in_common / neighbours.size
