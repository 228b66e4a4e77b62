"""Training batches, and the samplers that decide what is in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from mas_embed.data import Part
from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.runtime.checks import as_whole_number, check_choice
from mas_embed.runtime.seeding import LARGEST_SEED, mixed_seed, seed_cpu, unchanged_generators
from mas_embed.runtime.signals import ignore_signals
from mas_embed.training.order import ResumableOrder
from mas_embed.training.recipe import MakeSampler

SAMPLERS = Registry("sampler")

View = Literal["training", "clean"]


def training_batches(
    part: Part,
    *,
    batch_size: int,
    sampler: MakeSampler | None = None,
    num_workers: int = 0,
    view: View = "training",
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Batches of (inputs, labels) whose one pass is one epoch; without a sampler every item once in random order.

    Augmented inputs do not depend on the number of workers: at the start of an epoch one number is drawn, and from it a seed
    for each position in the order of the epoch. Every item is augmented under the seed of its position.

    Args:
        part: the items.
        batch_size: the number of items of a batch; the last batch may be smaller.
        sampler: `labels [N] -> Sampler` of one epoch; None for every item once, shuffled.
        num_workers: processes that load the batches; 0 to load them in this one.
        view: "training" for the augmented inputs of the part, if it has any; "clean" for its inputs as they are.
        generator: of the order without a sampler and of the augmentation; None for torch's global generator.

    Raises:
        UserError: an unknown view.

    Examples:
        >>> part = Part(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
        >>> [len(labels) for _, labels in training_batches(part, batch_size=2)]
        [2, 2, 1]
    """
    check_choice("view", view, get_args(View))
    order = sampler(part.labels) if sampler is not None else RandomSampler(part, generator=generator)
    is_augmented = part.augmented is not None and view == "training"
    return DataLoader(
        _AugmentedItems(part) if is_augmented else part,
        batch_size=batch_size,
        sampler=_WithSeeds(order, generator) if is_augmented else order,
        num_workers=num_workers,
        generator=generator,
        worker_init_fn=ignore_signals if num_workers else None,
    )


class _WithSeeds(Sampler[tuple[int, int]]):
    """The indices of a sampler, each with a seed; the seeds of an epoch come from one number of the generator.

    A trainer that calls `set_epoch`, so that an epoch can be repeated, gets a number that depends on the epoch and on the
    seed of the generator alone.
    """

    def __init__(self, order: Iterable[int], generator: torch.Generator | None) -> None:
        self.order, self.generator, self.epoch = order, generator, -1
        self._initial_seed = torch.initial_seed() if generator is None else generator.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass is, also to the sampler inside."""
        self.epoch = epoch
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.epoch >= 0:
            epoch_seed = mixed_seed(self._initial_seed, self.epoch)
        else:
            epoch_seed = int(torch.randint(LARGEST_SEED, (), generator=self.generator))
        seeds = torch.Generator().manual_seed(epoch_seed)
        indices = iter(self.order)
        for _ in range(self.order.num_skipped if isinstance(self.order, ResumableOrder) else 0):
            torch.randint(LARGEST_SEED, (), generator=seeds)
        for index in indices:
            yield index, int(torch.randint(LARGEST_SEED, (), generator=seeds))


class _AugmentedItems(Dataset[tuple[Any, int]]):
    """The training view of a part, indexed by `(index, seed)`."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Any, int]:
        return self.__getitems__([index_and_seed])[0]

    def __getitems__(self, indices_and_seeds: Iterable[tuple[int, int]]) -> list[tuple[Any, int]]:
        """The items of a batch, which a `DataLoader` asks for: saving the state of NumPy's generator takes 0.2 ms."""
        items = []
        with unchanged_generators():
            for index, seed in indices_and_seeds:
                seed_cpu(seed)
                items.append((self.part.augmented[index], int(self.part.labels[index])))
        return items


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
