"""Methods as a callback of Lightning 2.x, a loss for the methods that need the batches, and a data module of splits.

The classes derive from those of `lightning.pytorch`. A `pytorch_lightning.Trainer` also accepts the callback, whose hooks it
calls by name, but not the data module. `lightning` must be installed in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from mas_embed import Method, UserError, require_library, seeded
from mas_embed.integrations.lightning_checks import check_method, check_optimizers, check_order, check_trainer
from mas_embed.integrations.lightning_splits import SplitsDataModule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

    Trainer = Any
else:
    Callback = require_library("lightning.pytorch", extra="lightning").Callback

LogPenalty = Literal["epoch", "step", "never"]

# Samplers that go over every item of the data set; a subclass may not
_WHOLE_DATASET = (RandomSampler, SequentialSampler, DistributedSampler)


class MethodCallback(Callback):
    """Calls the hooks of a method while a Lightning `Trainer` fits a split. One callback is used for all splits.

    - When training starts: `begin_split`, unless training resumes in the middle of a split.
    - Before every optimizer step: `add_penalty_grad`, once for accumulated batches, after unscaling and before clipping.
    - After every optimizer step that was not skipped by a gradient scaler: `after_step`.
    - When training ends: `consolidate`. It does not run if training ends with an exception.

    The state of the method is part of the checkpoint. Lightning writes the checkpoint of the last epoch before training ends.
    Resuming from it consolidates the split at the end of that `fit`. For the next split, save a checkpoint after `fit` with
    `trainer.save_checkpoint(path)`.

    Methods with `batch_hooks` (replay, LwF, class statistics) see the batches in `training_loss`, which the `training_step`
    of the module must then return.

    Args:
        method: a method that was made with the LightningModule or with a module inside it.
        batches: what the method consolidates on: batches in the form that its `consolidate` takes, on any device; the attribute
            can be replaced for every split. None takes every item of the trainer's training data once, in order and without
            the random state of the training; random augmentations of the data set are applied.
        log_penalty: logs the method's penalty as "penalty" at the end of every "epoch", before every optimizer "step", whose
            value is that of the penalty whose gradient is added, or "never". Each value costs one pass over the parameters.

    Raises:
        UserError: an argument is not accepted; or, from `fit`, the method cannot be served, as with manual optimization.
    """

    def __init__(
        self, method: Method, *, batches: Iterable[Any] | None = None, log_penalty: LogPenalty = "epoch"
    ) -> None:
        if not isinstance(method, Method):
            raise UserError(f"MethodCallback takes a method, such as MAS(module), got a {type(method).__name__}")
        if log_penalty not in get_args(LogPenalty):
            raise UserError(f"log_penalty must be one of {', '.join(get_args(LogPenalty))}, got {log_penalty!r}")
        self.method, self.batches, self.log_penalty = method, batches, log_penalty
        self._is_in_split = False  # from begin_split to consolidate; part of the state
        self._has_started = False  # whether `fit` has started to train
        self._is_resumed = False  # whether a state from the middle of a split was loaded and not yet continued
        self._has_gradient = False  # whether a backward pass has run since the last optimizer step
        self._added_penalty = False  # whether the current optimizer step includes the penalty
        self._has_seen_batch = False  # whether `training_loss` has shown the current batch to the method
        self._hook_handles: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses to start a new `fit` from a state that was loaded by hand and lies in the middle of a split."""
        if stage == "fit" and self._is_resumed:
            raise UserError(
                "the state of the method was saved before its split was consolidated; pass that checkpoint as ckpt_path to fit, "
                "which ends the split, or load one that was saved after fit"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be served exactly."""
        check_trainer(trainer, pl_module)
        check_optimizers(trainer)
        check_method(self.method, trainer, pl_module)
        check_order(self, trainer)
        self._has_started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the split, or continues it after a checkpoint was restored."""
        self.method.load_state_dict(self.method.state_dict())  # moves the state to the model's device
        if not self._is_resumed:
            if not self.method.is_learning:
                raise UserError(
                    f"{self.method.name} does not train on further splits; call fit only while method.is_learning is true"
                )
            self.method.begin_split()
        self._is_in_split, self._is_resumed, self._has_started = True, False, True
        self._has_gradient = self._added_penalty = self._has_seen_batch = False
        self._hook_handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a method that needs the batches if `training_step` did not show it the batch."""
        if self.method.batch_hooks and not self._has_seen_batch:
            raise UserError(
                f"{self.method.name} needs {', '.join(sorted(self.method.batch_hooks))}, for which Lightning has no hook; return "
                "mas_embed.integrations.lightning.training_loss(self, inputs, labels, loss=...) from training_step"
            )
        self._has_gradient, self._has_seen_batch = True, False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient of the penalty; not if `training_step` returned None for all batches of the step."""
        self._added_penalty, self._has_gradient = self._has_gradient, False
        if self._added_penalty and self.log_penalty == "step":
            self._log(pl_module, on_step=True)
        if self._added_penalty:
            self.method.add_penalty_grad()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the penalty."""
        if self.log_penalty == "epoch":
            self._log(pl_module, on_step=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidates the split."""
        self._remove_hooks()
        self._consolidate(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Removes the hooks from the optimizer; the split is not consolidated."""
        self._remove_hooks()
        self._is_resumed = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidates a split whose last epoch was restored, for which Lightning skips training and `on_train_end`.

        Raises:
            UserError: Lightning has skipped the training of a new split.
        """
        if not self._has_started and trainer.ckpt_path is None and trainer.fit_loop.done:
            raise UserError(
                "fit has not trained, because this trainer had reached its max_epochs or max_steps before; make a new Trainer "
                "for every split"
            )
        if self._is_resumed:
            device = pl_module.device
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            self.method.load_state_dict(self.method.state_dict())
            self._consolidate(trainer, pl_module)
            pl_module.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The state of the method, and whether it lies in the middle of a split."""
        return {"method": self.method.state_dict(), "is_in_split": self._is_in_split}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a state; load the weights of the module first."""
        if missing := {"method", "is_in_split"} - state_dict.keys():
            raise UserError(f"the state lacks {', '.join(sorted(missing))}; it is not a state of MethodCallback")
        self.method.load_state_dict(state_dict["method"])
        self._is_in_split = self._is_resumed = bool(state_dict["is_in_split"])

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Called by the optimizer at the end of its `step`, which a gradient scaler does not call for a skipped step."""
        if self._added_penalty:
            self._added_penalty = False
            self.method.after_step(optimizer)

    def _consolidate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = self.batches if self.batches is not None else _training_batches(trainer)
        # Compiled modules run eagerly, because compiled code does not call the hooks by which gradients are observed
        with seeded(0), torch.compiler.set_stance("force_eager"):
            self.method.consolidate(_MovedBatches(batches, trainer, pl_module))
        self._is_in_split = self._is_resumed = False

    @torch.no_grad()
    def _log(self, pl_module: LightningModule, *, on_step: bool) -> None:
        pl_module.log("penalty", self.method.penalty(), on_step=on_step, on_epoch=not on_step, batch_size=1)

    def _remove_hooks(self) -> None:
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles = []


def training_loss(
    pl_module: LightningModule,
    inputs: Any,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    embed: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """The loss of a batch with everything that the method of the trainer's `MethodCallback` adds to it.

    Return it from `training_step`. It is `loss(embeddings, labels) + batch_penalty`, where the method may have appended items
    to the batch or rows to its embeddings. The penalty on the parameters is not included, because the callback adds its
    gradient. Without a `MethodCallback`, it is `loss(embed(inputs), labels)`.

    Args:
        pl_module: the module that is trained.
        inputs: of the batch, as the module takes them.
        labels: [N] integers.
        loss: `(embeddings [N, D], labels [N]) -> Tensor []`; call a miner inside it.
        embed: `(inputs) -> Tensor [N, D]`; None calls the module itself.
    """
    trainer: Trainer = pl_module.trainer
    callbacks = [item for item in trainer.callbacks if isinstance(item, MethodCallback)]
    method = callbacks[0].method if callbacks else Method(pl_module)
    inputs, labels = method.extend_batch(inputs, labels)
    embeddings = embed(inputs) if embed is not None else pl_module(inputs)
    penalty = method.batch_penalty(inputs, embeddings)
    embeddings, labels = method.extend_embeddings(embeddings, labels)
    value = loss(embeddings, labels)
    for callback in callbacks:
        callback._has_seen_batch = True
    return value if penalty is None else value + penalty


@dataclass(frozen=True)
class _MovedBatches:
    """Batches in the precision and on the device of a module; can be read again if the batches can."""

    batches: Iterable[Any]
    trainer: Trainer
    pl_module: LightningModule

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            converted = self.trainer.precision_plugin.convert_input(batch)
            yield self.pl_module.transfer_batch_to_device(converted, self.pl_module.device, 0)


def _training_batches(trainer: Trainer) -> DataLoader[Any]:
    """Every item of the trainer's training data once, in order; with several processes, the items of this process."""
    is_of_splits = isinstance(trainer.datamodule, SplitsDataModule)
    loader = trainer.datamodule.ordered_dataloader() if is_of_splits else trainer.train_dataloader
    if reason := _why_not_ordered(loader):
        raise UserError(
            f"the training data {reason}, so its items cannot be read in order; pass MethodCallback(method, batches=...)"
        )
    items = loader.dataset
    if trainer.world_size > 1:
        items = Subset(items, range(trainer.global_rank, len(items), trainer.world_size))
    return DataLoader(
        items,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # not the global one
    )


def _why_not_ordered(loader: Any) -> str:
    """Why the items of a loader cannot be read in order; "" if they can."""
    if not isinstance(loader, DataLoader):
        return f"is a {type(loader).__name__} instead of one DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "is an IterableDataset"
    if loader.batch_size is None:
        return "has a batch sampler of its own"
    if type(loader.sampler) not in _WHOLE_DATASET:
        return f"has a sampler of its own, {type(loader.sampler).__name__}"
    return ""
