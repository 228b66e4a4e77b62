"""A Lightning data module of one split of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from mas_embed import Part, Split, UserError, require_library, training_batches

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    LightningDataModule = require_library("lightning.pytorch", extra="lightning").LightningDataModule


class SplitsDataModule(LightningDataModule):
    """Loaders of one split of a sequence: shuffled training items, and queries and gallery as `predict_dataloader`.

    The order of the items depends on the seed, the split and the epoch only, so that a resumed run sees the batches of an
    uninterrupted one. With several processes, every process trains on its share of the items.

    Args:
        splits: the sequence.
        split_index: the split to train on, from 0.
        batch_size: the number of items of a batch; for training, the last batch of an epoch may be smaller.
        sampler: `labels [N] -> Sampler` of one epoch, such as `functools.partial(per_class_sampler, m=4)`; None shuffles all
            items. A `MethodCallback` consolidates on all training items whatever the sampler.
        num_workers: processes that load items.
        seed: of the order of the items.

    Raises:
        UserError: `splits` is not a sequence of `Split` or has no such split.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        *,
        split_index: int = 0,
        batch_size: int = 64,
        sampler: Callable[[Tensor], Sampler[int]] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(splits, Sequence) or not all(isinstance(split, Split) for split in splits):
            raise UserError(f"splits must be a sequence of Split, got a {type(splits).__name__} with other items")
        if split_index not in range(len(splits)):
            raise UserError(f"split_index must be from 0 to {len(splits) - 1}, got {split_index!r}")
        self.splits, self.split_index, self.batch_size = splits, split_index, batch_size
        self.sampler, self.num_workers, self.seed = sampler, num_workers, seed

    @property
    def split(self) -> Split:
        """The split that is trained on."""
        return self.splits[self.split_index]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches `(inputs, labels)` of the training items, augmented if the part has a training view."""
        part = self.split.train
        sampler = self._shuffled(part) if self.sampler is None else self.sampler(part.labels)
        if part.augmented is not None and self.trainer is not None and self.trainer.world_size > 1:
            raise UserError("augmented inputs are loaded in one process only; train in one, or without augmentation")
        return training_batches(
            part,
            batch_size=self.batch_size,
            sampler=lambda labels: sampler,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Batches of the queries and of the gallery, in order."""
        return [self._loader(self.split.query), self._loader(self.split.gallery)]

    def ordered_dataloader(self) -> DataLoader[Any]:
        """Batches of the training items in order, each item once."""
        return self._loader(self.split.train)

    def state_dict(self) -> dict[str, Any]:
        """The index of the split."""
        return {"split_index": self.split_index}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises `UserError` if the state is that of another split, because `fit` resumes within one split."""
        if (saved := state_dict["split_index"]) != self.split_index:
            raise UserError(
                f"the checkpoint is of split {saved}, but the data module trains on split {self.split_index}; fit resumes "
                "within a split, so load the weights and the state of the method instead of passing ckpt_path"
            )

    def _shuffled(self, part: Part) -> Sampler[int]:
        """All items in an order that Lightning changes from epoch to epoch by `set_epoch`."""
        num_processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        seed = 1_000_003 * self.seed + 10_007 * self.split_index  # to which the sampler adds the epoch
        return DistributedSampler(part, num_replicas=num_processes, rank=rank, shuffle=True, seed=seed)

    def _loader(self, part: Part) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)  # not the global one
        return DataLoader(part, batch_size=self.batch_size, num_workers=self.num_workers, generator=generator)
