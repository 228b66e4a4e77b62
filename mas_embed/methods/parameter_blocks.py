"""How element-wise work on all parameters is cut, so that what is computed on the way stays in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

CPU_BLOCK = 2**18  # elements, 1 MiB of float32; measured: smaller ones cost calls, larger ones memory
GPU_BLOCK = 2**26  # elements; few launches, and what is computed on the way takes 256 MiB


def in_blocks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[list[Tensor]]]:
    """The same tensors as lists of at most about one block of elements, for the `torch._foreach_*` functions.

    Args:
        rows: tuples of tensors of one shape. Large ones are cut along their first dimension; the pieces are views.

    Yields:
        A list for every place in the tuples.
    """
    pieces: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        limit = GPU_BLOCK if row[0].is_cuda else CPU_BLOCK
        for piece in zip(*(_cut(tensor, limit) for tensor in row), strict=True):
            if pieces and size + piece[0].numel() > limit:
                yield [list(column) for column in zip(*pieces, strict=True)]
                pieces, size = [], 0
            pieces.append(piece)
            size += piece[0].numel()
    if pieces:
        yield [list(column) for column in zip(*pieces, strict=True)]


def _cut(tensor: Tensor, limit: int) -> tuple[Tensor, ...]:
    if tensor.numel() <= limit:
        return (tensor,)
    return tensor.split(max(1, limit // tensor[0].numel()))
