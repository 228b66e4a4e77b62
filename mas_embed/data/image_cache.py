"""Decoded images in memory of a bounded size, which this process shares with the worker processes that it forks later."""

from __future__ import annotations

import mmap
import multiprocessing
from typing import Any

import torch
from torch import Tensor

from mas_embed.errors import UserError

_HEADER = 8  # bytes at the start of the memory, which hold the number of bytes in use


class ImageCache:
    """Images [C, H, W] of bytes by number, as many as fit; an image that was stored stays.

    The memory is reserved at once and is used as images are stored. A process that is started by pickling instead of forking
    has an empty cache, which stores nothing.

    Args:
        num_images: the images have the numbers 0 to `num_images - 1`.
        num_bytes: the memory for all of them together; 0 to store nothing.

    Raises:
        UserError: the memory cannot be reserved.

    Examples:
        >>> cache = ImageCache(num_images=2, num_bytes=100)
        >>> cache.store(1, torch.ones(3, 2, 2, dtype=torch.uint8))
        >>> cache.get(0) is None, cache.get(1).shape
        (True, torch.Size([3, 2, 2]))
    """

    def __init__(self, num_images: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._lock = multiprocessing.Lock()
        try:
            self._memory = _shared(_HEADER + self.num_bytes) if self.num_bytes else None
            self._table = _shared(max(num_images, 1) * 4 * 8).view(torch.int64).view(-1, 4)  # 1 + start, C, H, W
        except (OSError, OverflowError, ValueError):
            raise UserError(
                f"cannot reserve {num_bytes / 2**20:.0f} MiB of memory for decoded images; lower keep_megabytes"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"num_bytes": 0, "_memory": None}

    def get(self, number: int) -> Tensor | None:
        """The image with that number, in the memory of the cache; None if it is not stored."""
        if self._memory is None:
            return None
        with self._lock:  # which also makes the bytes that another process wrote visible
            start, *shape = self._table[number].tolist()
        if not start:
            return None
        start += _HEADER - 1
        return self._memory[start : start + shape[0] * shape[1] * shape[2]].view(shape)

    def store(self, number: int, image: Tensor) -> None:
        """Stores an image, uint8 [C, H, W], if there is room."""
        if self._memory is None:
            return
        used = self._memory[:_HEADER].view(torch.int64)
        with self._lock:
            start = int(used)
            if start + image.numel() > self.num_bytes or int(self._table[number, 0]):
                return
            used += image.numel()
        self._memory[_HEADER + start : _HEADER + start + image.numel()] = image.flatten()
        with self._lock:
            self._table[number] = torch.tensor([1 + start, *image.shape])


def _shared(num_bytes: int) -> Tensor:
    """Zeros that processes share which are forked from this one."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
