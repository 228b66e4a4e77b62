"""Blocks of parameters for element-wise operations, which are small enough for intermediate results to stay in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from mas_embed.runtime.sharding import own_shard

CPU_BLOCK = 2**18  # elements, 1 MiB of float32; measured: smaller blocks need more calls, larger ones exceed the cache
GPU_BLOCK = 2**26  # elements; few kernel launches, and an intermediate result takes 256 MiB of float32


def in_blocks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[list[Tensor]]]:
    """Groups tensors into blocks of limited size, as arguments for the `torch._foreach_*` functions.

    Args:
        rows: tuples of tensors, all of one shape within a tuple: a parameter, its gradient and its importance, for example.
            Tensors larger than a block are split along their first dimension into views. Of tensors that are sharded over
            processes, the shard of this one is taken.

    Yields:
        A block, as one list of tensors for each position in the tuples. A block has at most `CPU_BLOCK` or `GPU_BLOCK`
        elements per list, unless a single row of a tensor is larger.
    """
    pieces: list[tuple[Tensor, ...]] = []
    size = 0
    for row in (tuple(map(own_shard, given)) for given in rows):
        if row[0].numel() == 0:
            continue
        limit = GPU_BLOCK if row[0].is_cuda else CPU_BLOCK
        is_whole = row[0].numel() <= limit
        for piece in [row] if is_whole else zip(*(_split_rows(tensor, limit) for tensor in row), strict=True):
            if pieces and size + piece[0].numel() > limit:
                yield [list(column) for column in zip(*pieces, strict=True)]
                pieces, size = [], 0
            pieces.append(piece)
            size += piece[0].numel()
    if pieces:
        yield [list(column) for column in zip(*pieces, strict=True)]


def _split_rows(tensor: Tensor, limit: int) -> tuple[Tensor, ...]:
    return tensor.split(max(1, limit // tensor[0].numel()))
