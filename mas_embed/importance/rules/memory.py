"""Memory and precision of the rules: blocks of samples, reused scratch memory and the dtype of sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

CPU_BLOCK_BYTES = 10 * 2**20  # fits a processor's cache; larger blocks would go through main memory
GPU_BLOCK_BYTES = 256 * 2**20  # few kernel launches; measured: smaller blocks take longer, larger ones only memory

_SCRATCH: ContextVar[dict[str, Tensor] | None] = ContextVar("scratch", default=None)


def block_bytes(device: torch.device) -> int:
    """The memory of a block of samples."""
    return GPU_BLOCK_BYTES if device.type == "cuda" else CPU_BLOCK_BYTES


def sample_blocks(num_samples: int, bytes_per_sample: int, device: torch.device) -> Iterator[slice]:
    """Slices that divide the samples into blocks of at most `block_bytes(device)`, but at least one sample."""
    size = max(1, block_bytes(device) // max(1, bytes_per_sample))
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


def sum_of_powers(gradient: Tensor, exponent: int) -> Tensor:
    """`sum_n |gradient_n|^exponent` over the first dimension; may change `gradient`."""
    if exponent == 1 and gradient.is_cuda:  # one kernel, which reads the gradients once
        return torch.linalg.vector_norm(gradient, 1, dim=0)
    return absolute_power(gradient, exponent).sum(0)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the dtype of the tensor if that is wider, so that sums over samples are never computed in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
