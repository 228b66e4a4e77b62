"""How rules bound their memory and choose their precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20


def sample_blocks(num_samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Slices that cover the samples in blocks of about `BLOCK_BYTES`, of at least one sample."""
    size = max(1, BLOCK_BYTES // max(1, bytes_per_sample))
    for start in range(0, num_samples, size):
        yield slice(start, start + size)


def absolute_power(gradient: Tensor, exponent: int) -> Tensor:
    """`|gradient|^exponent` for an exponent of 1 or 2, in place."""
    return gradient.abs_() if exponent == 1 else gradient.square_()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own type where that is wider: sums over samples are never taken in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
