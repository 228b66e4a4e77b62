"""How rules bound their memory, use it again, and choose their precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

BLOCK_BYTES = 10 * 2**20  # of a processor's cache; more only moves memory

_SCRATCH: ContextVar[dict[str, Tensor] | None] = ContextVar("scratch", default=None)


def sample_blocks(num_samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Slices that cover the samples in blocks of about `BLOCK_BYTES`, of at least one sample."""
    size = max(1, BLOCK_BYTES // max(1, bytes_per_sample))
    for start in range(0, num_samples, size):
        yield slice(start, min(start + size, num_samples))


@contextmanager
def scratch_space() -> Iterator[None]:
    """Within its body, `scratch` gives the same memory again: new pages for every layer cost more than the work on them."""
    token = _SCRATCH.set({})
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of undefined content, of the dtype and device of `like`; valid until the next call with the same name."""
    space = _SCRATCH.get()
    size = torch.Size(shape).numel()
    if space is None:
        return like.new_empty(shape)
    kept = space.get(name)
    if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
        kept = space[name] = like.new_empty(size)
    return kept[:size].view(shape)


def absolute_power(gradient: Tensor, exponent: int) -> Tensor:
    """`|gradient|^exponent` for an exponent of 1 or 2, in place."""
    return gradient.abs_() if exponent == 1 else gradient.square_()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own type where that is wider: sums over samples are never taken in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
