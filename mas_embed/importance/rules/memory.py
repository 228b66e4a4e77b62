"""Memory and precision of the rules: blocks of samples, reused scratch memory and the dtype of sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

BLOCK_BYTES = 10 * 2**20  # fits a processor's cache; larger blocks would go through main memory

_SCRATCH: ContextVar[dict[str, Tensor] | None] = ContextVar("scratch", default=None)


def sample_blocks(num_samples: int, bytes_per_sample: int) -> Iterator[slice]:
    """Slices that divide the samples into blocks of at most `BLOCK_BYTES`, but at least one sample."""
    size = max(1, BLOCK_BYTES // max(1, bytes_per_sample))
    for start in range(0, num_samples, size):
        yield slice(start, min(start + size, num_samples))


@contextmanager
def scratch_space() -> Iterator[None]:
    """Makes `scratch` reuse its memory within the context, since new pages for every layer cost more than the computation."""
    token = _SCRATCH.set({})
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialized tensor with the dtype and device of `like`; valid until the next call with the same name."""
    space = _SCRATCH.get()
    size = torch.Size(shape).numel()
    if space is None:
        return like.new_empty(shape)
    memory = space.get(name)
    if memory is None or memory.numel() < size or memory.dtype != like.dtype or memory.device != like.device:
        memory = space[name] = like.new_empty(size)
    return memory[:size].view(shape)


def absolute_power(gradient: Tensor, exponent: int) -> Tensor:
    """`|gradient|^exponent` for an exponent of 1 or 2, computed in place."""
    return gradient.abs_() if exponent == 1 else gradient.square_()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the dtype of the tensor if that is wider, so that sums over samples are never computed in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
