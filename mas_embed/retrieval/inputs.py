"""Checks and conversions of embeddings, labels and ids that users pass, and small functions on embeddings and neighbours."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError

ROWS_AT_ONCE = 2**16  # read from an array at once, so that an array mapped from disk is never in memory as a whole
PAIRS_AT_ONCE = 2**22  # pairs of neighbours that are compared at once


def as_embeddings(values: ArrayLike | Tensor, name: str) -> Tensor:
    """The embeddings [N, D] as a tensor, which shares memory with `values` if possible; `name` is used in errors.

    Raises:
        UserError: the values are not real numbers of shape [N, D], N is 0, or a value is NaN or infinite.
    """
    rows = as_tensor(values, name)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_complex():
        raise UserError(f"{name} must be real numbers of shape [N, D], got {rows.dtype} of shape {list(rows.shape)}")
    if len(rows) == 0:
        raise UserError(f"{name} must hold at least one embedding, got none")
    if not all(bool(block.isfinite().all()) for block in rows.split(ROWS_AT_ONCE)):
        raise UserError(f"{name} contain NaN or infinite embeddings")
    return rows


def as_integers(values: ArrayLike | Tensor, name: str, num_items: int | None = None) -> Tensor:
    """The labels or ids [N] as an int64 tensor; `name` is used in errors.

    Args:
        values: [N] integers.
        name: the name of the argument.
        num_items: the number of embeddings, which N must equal; None: any N.

    Raises:
        UserError: the values are not integers of shape [N], or N is not `num_items`.
    """
    numbers = as_tensor(values, name)
    if numbers.ndim != 1 or (len(numbers) and numbers.is_floating_point()) or numbers.is_complex():
        raise UserError(f"{name} must be integers of shape [N], got {numbers.dtype} of shape {list(numbers.shape)}")
    if num_items is not None and len(numbers) != num_items:
        raise UserError(f"there are {num_items} embeddings but {len(numbers)} {name}")
    return numbers.long()


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


def as_tensor(values: ArrayLike | Tensor, name: str) -> Tensor:
    """The values as a tensor without gradients, which shares memory with `values` if possible; `name` is used in errors.

    Raises:
        UserError: the values are not numbers, or rows differ in length.
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        with warnings.catch_warnings():
            # Arrays mapped from a file are often read-only; the package never writes into its inputs
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be an array of numbers: {error}") from None
