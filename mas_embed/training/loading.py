"""Training batches, and the samplers that decide what is in them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler

from mas_embed.data import Part
from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.runtime.checks import as_whole_number
from mas_embed.training.recipe import MakeSampler

SAMPLERS = Registry("sampler")


def training_batches(
    part: Part, *, batch_size: int, sampler: MakeSampler | None = None, num_workers: int = 0
) -> DataLoader[Any]:
    """Batches of (inputs, labels) whose one pass is one epoch; without a sampler every item once in random order."""
    order = sampler(part.labels) if sampler is not None else RandomSampler(part)
    return DataLoader(part, batch_size=batch_size, sampler=order, num_workers=num_workers)


@SAMPLERS.register("MPerClassSampler")
def per_class_sampler(labels: Tensor, *, m: int) -> Sampler[int]:
    """pytorch-metric-learning's `MPerClassSampler` with an epoch of one pass over the labels, rounded up.

    Takes m images of every class in turn, the classes in random order: a batch of B images holds B / m classes, or all
    of them several times over where they are fewer. (The library's own default epoch is 100,000 images, whatever the
    data.)

    Args:
        labels: [N].
        m: images per class in a turn.

    Raises:
        UserError: m is not a whole number >= 1, there are no labels, or a class has fewer than m images.
    """
    from pytorch_metric_learning.samplers import MPerClassSampler

    m = as_whole_number("the sampler's m, images per class,", m)
    if m < 1:
        raise UserError(f"the sampler's m, images per class, must be at least 1, got {m}")
    if len(labels) == 0:
        raise UserError("the sampler needs at least one label, got none")
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < m:
        scarce = int(classes[counts.argmin()])
        raise UserError(
            f"the sampler wants m={m} images per class, but class {scarce} has {int(counts.min())}; lower m"
        )
    length = math.ceil(len(labels) / (m * len(classes))) * m * len(classes)
    return MPerClassSampler(labels, m=m, length_before_new_iter=length)
