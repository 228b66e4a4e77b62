"""Which weights a record or an index was made with."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

SMALL_BYTES = 2**16


def fingerprint_of(model: nn.Module) -> str:
    """A short text that changes with the names, shapes and values of the model's parameters and buffers. O(parameters).

    Values enter by sums of their bits, weighted by place, which are the same on every device; it is no protection against
    forgery.
    """
    described = hashlib.sha256()
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, tensor in state.items():
        described.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    values = [tensor.contiguous().flatten().view(torch.uint8) for tensor in state.values()]
    large = [stored for stored in values if len(stored) > SMALL_BYTES]
    small = [stored for stored in values if len(stored) <= SMALL_BYTES]
    if small:  # and many: as one, which is faster
        large.append(torch.cat([stored.to(small[0].device) for stored in small]))
    sums = [int(_weighted_bits(stored)) for stored in large]
    described.update(f"{sums}".encode())
    return described.hexdigest()[:16]


def _weighted_bits(stored: Tensor, width: int = 64) -> Tensor:
    """Of bytes, as 8-byte integers in rows of `width`: row and column sums times odd numbers growing with the place, mod 2^64."""
    stored = stored.clone() if stored.storage_offset() % 8 else stored  # so that it can be read eight bytes at a time
    length = len(stored) // (8 * width) * 8 * width
    whole, tail = stored[:length].view(torch.int64).view(-1, width), stored[length:].long()
    parts = [whole.sum(1), whole.sum(0), tail]
    places = [2 * torch.arange(len(part), device=stored.device) + 1 for part in parts]
    return torch.stack([(part * place).sum() for part, place in zip(parts, places, strict=True)]).sum()
