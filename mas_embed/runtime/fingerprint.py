"""Fingerprints that tell which weights a record or an index was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mas_embed.runtime.sharding import whole

SMALL_BYTES = 2**16


def fingerprint_of(model: nn.Module) -> str:
    """A short string that changes with the names, shapes and values of the model's parameters and buffers. O(parameters).

    The values enter as sums of their bits, weighted by position, which are the same on every device. The fingerprint does not
    protect against deliberate forgery.
    """
    return fingerprint_of_tensors(
        {name: whole(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    )


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """As `fingerprint_of`, of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode(errors="surrogatepass"))
    values = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors.values()]
    chunks = [data for data in values if len(data) > SMALL_BYTES]
    small = [data for data in values if len(data) <= SMALL_BYTES]
    if small:  # there may be many, and summing them as one tensor is faster
        chunks.append(torch.cat([data.to(small[0].device) for data in small]))
    sums = [_weighted_bits(data) for data in chunks]
    devices = {total.device for total in sums}
    # A GPU is waited for once
    integers = torch.stack(sums).tolist() if len(devices) == 1 else [int(total) for total in sums]
    digest.update(f"{integers}".encode())
    return digest.hexdigest()[:16]


def _weighted_bits(data: Tensor, width: int = 64) -> Tensor:
    """A checksum mod 2^64 of bytes [N].

    The bytes are read as 8-byte integers in rows of `width`. Every row sum, every column sum and every remaining byte is
    multiplied by an odd number that grows with its position, and the products are added up.
    """
    data = data.clone() if data.storage_offset() % 8 else data  # reading eight bytes at a time needs this alignment
    length = len(data) // (8 * width) * 8 * width
    whole, tail = data[:length].view(torch.int64).view(-1, width), data[length:].long()
    parts = torch.cat([whole.sum(1), whole.sum(0), tail])
    odd = 2 * torch.arange(max(len(whole), width, len(tail)), device=data.device) + 1
    return (parts * torch.cat([odd[: len(whole)], odd[:width], odd[: len(tail)]])).sum()
