"""What a split teaches: one batch, one epoch, one split. The only place that calls the hooks of a method."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from mas_embed.data import Split
from mas_embed.errors import raised_by
from mas_embed.methods import Loss, Method
from mas_embed.runtime.distributed import average_gradients
from mas_embed.training.callbacks import Callbacks, EpochEnd, Event, StepEnd
from mas_embed.training.checkpointing import SplitCheckpoints
from mas_embed.training.loading import training_batches
from mas_embed.training.optimizers import make_optimizer
from mas_embed.training.order import ResumableOrder
from mas_embed.training.processes import (
    own_batch,
    own_random_numbers,
    shared_loader,
    synchronized_batch_norm,
    take_loss_from_first,
    whole_batch,
)
from mas_embed.training.recipe import Recipe
from mas_embed.training.split_training import SplitTraining


@dataclass(frozen=True)
class Learner:
    """Everything that takes part in learning a split, whichever it is.

    Attributes:
        model: as `Accelerator.prepare_model` gave it.
        method: how old knowledge is kept.
        loss: `(embeddings [N, D], labels [N], mined) -> Tensor []`.
        miner: `(embeddings, labels) -> mined`, or None.
        recipe: how a split is trained.
        accelerator: for devices, precision and several processes.
    """

    model: nn.Module
    method: Method
    loss: Loss
    miner: Any
    recipe: Recipe
    accelerator: Accelerator


@dataclass
class Stopwatch:
    """Wall time by what it was spent on, in seconds."""

    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "importance": 0.0, "evaluation": 0.0})
    _start: float = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of its body."""
        self._start = time.perf_counter()
        yield
        self.lap(name)

    def lap(self, name: str) -> None:
        """Adds the time until now of a body that goes on."""
        now = time.perf_counter()
        self.seconds[name] += now - self._start
        self._start = now


def learn_split(
    learner: Learner,
    split: Split,
    *,
    consolidate_on: Iterable[Any],
    callbacks: Callbacks,
    event: Event,
    stopwatch: Stopwatch,
    checkpoints: SplitCheckpoints | None = None,
) -> int:
    """Trains on one split, with a fresh optimizer and fresh copies of the loss and the miner, then lets the method consolidate.

    A loss with parameters (proxies) is trained with the model.

    Args:
        learner: the model and everything that trains it.
        split: that is learned.
        consolidate_on: the batches that the method consolidates on; read once training has ended.
        callbacks: their methods are called after every batch and epoch.
        event: where the training stands.
        stopwatch: of training and of consolidating.
        checkpoints: where the state within the split is stored and from which it goes on; None for neither.

    Returns:
        The number of batches that were trained on.

    Raises:
        RunError: the loss is not finite.
    """
    checkpoints = SplitCheckpoints() if checkpoints is None else checkpoints
    with stopwatch.timed("training"), synchronized_batch_norm(learner.method.model, learner.accelerator.device):
        num_steps = _train_epochs(learner, split, callbacks, event, checkpoints)
    with stopwatch.timed("importance"), raised_by("method"):
        learner.method.consolidate(consolidate_on)
    return num_steps


def _train_epochs(
    learner: Learner, split: Split, callbacks: Callbacks, event: Event, checkpoints: SplitCheckpoints
) -> int:
    """Trains on one split; returns the number of batches."""
    learner = replace(learner, loss=copy.deepcopy(learner.loss), miner=copy.deepcopy(learner.miner))
    training = _prepare(learner, split)
    if not checkpoints.restore(training):
        with raised_by("method"):
            learner.method.begin_split()
    with checkpoints.delay_signals():
        for _ in range(training.epoch, learner.recipe.epochs):
            _train_epoch(training, callbacks, event, checkpoints)
    return training.num_steps


def _train_epoch(training: SplitTraining, callbacks: Callbacks, event: Event, checkpoints: SplitCheckpoints) -> None:
    """Trains on the batches of an epoch that were not learned yet."""
    learner, optimizer, epoch = training.learner, training.optimizer, training.epoch
    learning_rate = _learning_rate(optimizer)
    learner.model.train()
    for batch in training.remaining_batches():
        norms: list[Tensor] | None = [] if callbacks.wants_norms else None
        training.losses.append(loss := training_step(learner, batch, optimizer, norms=norms, step=training.num_steps))
        training.num_steps += 1
        if callbacks.wants_steps:
            penalty = _penalty(learner.method)
            callbacks.on_step_end(
                StepEnd(
                    **vars(event),
                    epoch=epoch,
                    step=training.num_steps,
                    loss=loss,
                    penalty=penalty,
                    learning_rate=learning_rate,
                    gradient_norm=norms[0] if norms else None,
                )
            )
        checkpoints.between_steps(training, event)
    checkpoints.check_finite(training, event)
    if training.scheduler is not None:
        with raised_by("scheduler"):
            training.scheduler.step()
    losses = training.losses.values()
    training.end_epoch()
    callbacks.on_epoch_end(
        EpochEnd(
            **vars(event),
            epoch=epoch,
            num_epochs=learner.recipe.epochs,
            loss=float(losses.mean()),
            penalty=float(_penalty(learner.method)),
            learning_rate=learning_rate,
            num_batches=len(losses),
        )
    )
    checkpoints.between_steps(training, event)


def _prepare(learner: Learner, split: Split) -> SplitTraining:
    """The batches of the split, an optimizer without accumulated gradients, and a scheduler, all fresh."""
    recipe, accelerator = learner.recipe, learner.accelerator
    loss_parameters: list[nn.Parameter] = []
    if isinstance(learner.loss, nn.Module):
        loss_parameters = list(learner.loss.to(accelerator.device).parameters())
        take_loss_from_first(learner.loss)
    with raised_by("optimizer"):
        plain_optimizer = make_optimizer(accelerator.unwrap_model(learner.model), loss_parameters, recipe.optimizer)
    with raised_by("scheduler"):
        scheduler = recipe.scheduler(plain_optimizer) if recipe.scheduler is not None else None
    make_order = RandomSampler if recipe.sampler is None else recipe.sampler
    order = ResumableOrder(make_order(split.train.labels))
    batches = shared_loader(
        training_batches(
            split.train, batch_size=recipe.batch_size, sampler=lambda labels: order, num_workers=recipe.num_workers
        ),
        accelerator,
    )
    # Not by `accelerator.prepare`, which would keep the optimizer of every split in memory
    optimizer = AcceleratedOptimizer(plain_optimizer, scaler=accelerator.scaler)
    optimizer.zero_grad()  # a backward pass of the caller may have left gradients
    return SplitTraining(learner, order, batches, optimizer, scheduler)


def training_step(
    learner: Learner,
    batch: tuple[Any, Tensor],
    optimizer: AcceleratedOptimizer,
    *,
    norms: list[Tensor] | None = None,
    step: int = 0,
) -> Tensor:
    """Learns one batch under the method's penalties; returns the batch's loss without them, detached.

    Where gradients are accumulated, the penalty on the parameters is added, and the optimizer steps, once for several batches.
    If it steps, the norm of all gradients before clipping is appended to `norms`. In several processes, the loss is that of the
    whole batch, of which each process embeds its share.

    Args:
        learner: the model and everything that trains it.
        batch: inputs and labels; in several processes one of `shared_loader`.
        optimizer: of the model and the loss.
        norms: that the norm is appended to; None if it is not needed.
        step: the number of steps before this one in the split, from which processes draw different random numbers.
    """
    model, method, accelerator = learner.model, learner.method, learner.accelerator
    with accelerator.accumulate(model), own_batch(batch) as (inputs, labels):
        num_own = len(labels)
        with raised_by("method"):
            inputs, labels = method.extend_batch(inputs, labels)
        with raised_by("model"), own_random_numbers(step):
            embeddings = model(inputs)
        if len(embeddings) > len(labels) and num_own == 0:  # an item that only keeps the model busy comes first
            embeddings = embeddings[len(embeddings) - len(labels) :]
        with raised_by("method"):
            penalty = method.batch_penalty(inputs, embeddings)
            embeddings, labels = method.extend_embeddings(embeddings, labels)
        embeddings, labels = whole_batch(embeddings, labels, num_own)
        with raised_by("miner"):
            mined = learner.miner(embeddings, labels) if learner.miner is not None else None
        with raised_by("loss"):
            loss = learner.loss(embeddings, labels, mined)
            accelerator.backward(loss if penalty is None else loss + penalty)
        if accelerator.sync_gradients:
            _optimizer_step(learner, optimizer, norms)
    return loss.detach()


def _optimizer_step(learner: Learner, optimizer: AcceleratedOptimizer, norms: list[Tensor] | None) -> None:
    """One step of the optimizer on the gradients of the loss and of the penalty, clipped."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average_gradients(parameters)
    learner.accelerator.unscale_gradients(optimizer)
    with raised_by("method"):
        learner.method.add_penalty_grad()
    if norms is not None:
        norms.append(nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None]))
    if learner.recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, learner.recipe.clip_norm)
    with raised_by("optimizer"):
        optimizer.step()
    if not optimizer.step_was_skipped:  # by a gradient scaler, because gradients were infinite
        with raised_by("method"):
            learner.method.after_step(optimizer)
    optimizer.zero_grad()


@torch.no_grad()
def _penalty(method: Method) -> Tensor:
    return method.penalty()


def _learning_rate(optimizer: AcceleratedOptimizer) -> float:
    """That of the first parameter group."""
    return float(optimizer.param_groups[0]["lr"])
