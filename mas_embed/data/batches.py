"""Batches of a part, or of inputs without labels, in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mas_embed.data.split import Part


def ordered_batches(items: Part | Any, *, batch_size: int, num_workers: int = 0) -> Iterable[Any]:
    """Batches that hold every item once, in order and without randomness. Batches of a tensor are views of it.

    Args:
        items: a part, for batches of (inputs, labels), which are not augmented; or inputs, which have a length and are indexed
            by position, for batches of inputs alone.
        batch_size: the number of items of a batch; the last batch may be smaller.
        num_workers: processes that load the batches; 0 to load them in this one. Tensors need none.
    """
    if isinstance(items, Tensor):
        return items.split(batch_size)
    if isinstance(items, Part) and isinstance(items.inputs, Tensor):
        return list(zip(items.inputs.split(batch_size), items.labels.split(batch_size), strict=True))
    return DataLoader(items, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator())
