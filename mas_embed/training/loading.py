"""Batches of a split: for learning, with a sampler that is checked first, and for looking at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler

from mas_embed.data import Part
from mas_embed.errors import UserError

MakeSampler = Callable[[Tensor], Sampler[int]]


def training_batches(part: Part, *, batch_size: int, sampler: MakeSampler | None) -> DataLoader[Any]:
    """Batches of (inputs, labels) whose one pass is one epoch; every item once in random order where there is no sampler."""
    order = sampler(part.labels) if sampler is not None else RandomSampler(part)
    return DataLoader(part, batch_size=batch_size, sampler=order)


def ordered_batches(part: Part, *, batch_size: int) -> DataLoader[Any]:
    """Batches of (inputs, labels), every item once, in order; without randomness."""
    return DataLoader(part, batch_size=batch_size, generator=torch.Generator())


def unlabeled_batches(inputs: Any, *, batch_size: int) -> DataLoader[Any]:
    """Batches of inputs alone, every item once, in order; without randomness."""
    return DataLoader(inputs, batch_size=batch_size, generator=torch.Generator())


def per_class_sampler(labels: Tensor, *, m: int) -> Sampler[int]:
    """pytorch-metric-learning's `MPerClassSampler` with an epoch of one pass over the labels, rounded up.

    Deals m images of every class in turn, the classes in random order: a batch of B images holds B / m classes, or all
    of them several times over where they are fewer. (The library's own default epoch is 100,000 images, whatever the
    data.)

    Args:
        labels: [N].
        m: images per class in a turn.

    Raises:
        UserError: a class has fewer than m images.
    """
    from pytorch_metric_learning.samplers import MPerClassSampler

    if m < 1:
        raise UserError(f"the sampler's m, images per class, must be at least 1, got {m}")
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < m:
        scarce = int(classes[counts.argmin()])
        raise UserError(
            f"the sampler wants m={m} images per class, but class {scarce} has {int(counts.min())}; lower m"
        )
    length = math.ceil(len(labels) / (m * len(classes))) * m * len(classes)
    return MPerClassSampler(labels, m=m, length_before_new_iter=length)
