"""One split, one epoch, one optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from mas_embed.data import Split
from mas_embed.errors import RunError
from mas_embed.methods import Method
from mas_embed.training.loading import MakeSampler, training_batches

Loss = Callable[..., Tensor]
Miner = Callable[[Tensor, Tensor], Any]
MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a split is trained; see `train_sequence` for what each is."""

    loss: Loss
    miner: Miner | None
    sampler: MakeSampler | None
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None
    epochs: int
    batch_size: int


def train_split(
    model: nn.Module, split: Split, recipe: Recipe, *, method: Method, accelerator: Accelerator, on_event: OnEvent
) -> None:
    """Trains the model on one split, with a fresh optimizer and fresh copies of the loss and the miner.

    A loss with parameters of its own (proxies) is trained with the model.

    Raises:
        RunError: the loss is not finite.
    """
    loss, miner = copy.deepcopy(recipe.loss), copy.deepcopy(recipe.miner)
    own = list(loss.to(accelerator.device).parameters()) if isinstance(loss, nn.Module) else []
    plain_optimizer = make_optimizer(accelerator.unwrap_model(model), own, recipe.optimizer)
    scheduler = recipe.scheduler(plain_optimizer) if recipe.scheduler is not None else None
    batches, optimizer = accelerator.prepare(
        training_batches(split.train, batch_size=recipe.batch_size, sampler=recipe.sampler), plain_optimizer
    )
    optimizer.zero_grad()  # what a caller's own backward pass may have left
    method.begin_split()
    for epoch in range(recipe.epochs):
        model.train()
        losses = [
            training_step(
                model, batch, loss=loss, miner=miner, method=method, optimizer=optimizer, accelerator=accelerator
            )
            for batch in batches
        ]
        mean_loss = float(torch.stack(losses).mean())
        if not math.isfinite(mean_loss):
            raise RunError(f"training diverged, the loss is {mean_loss}: lower the learning rate, or the strength")
        if scheduler is not None:
            scheduler.step()
        on_event({"event": "epoch", "epoch": epoch, "loss": mean_loss, "num_batches": len(batches)})


def make_optimizer(model: nn.Module, others: list[nn.Parameter], make: MakeOptimizer) -> torch.optim.Optimizer:
    """An optimizer of everything in a model that learns, and of other parameters.

    Where a model has `parameter_groups(lr)`, that says how fast each of its parts learns at the optimizer's learning rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make([*parameters, *others])
    grouped = getattr(model, "parameter_groups", None)
    if not callable(grouped):
        return optimizer
    groups = grouped(optimizer.defaults["lr"])
    return make([*groups, {"params": others}] if others else groups)


def training_step(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    *,
    loss: Loss,
    miner: Miner | None,
    method: Method,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
) -> Tensor:
    """Learns one batch under the method's penalties; returns the batch's loss without them, detached.

    Where the accelerator accumulates gradients, the penalty on the parameters is added once for every optimizer step.
    """
    with accelerator.accumulate(model):
        inputs, labels = method.extend_batch(*batch)
        embeddings = model(inputs)
        extra = method.batch_penalty(inputs, embeddings)
        embeddings, labels = method.extend_embeddings(embeddings, labels)
        value = loss(embeddings, labels, miner(embeddings, labels) if miner is not None else None)
        accelerator.backward(value if extra is None else value + extra)
        if accelerator.sync_gradients:
            accelerator.unscale_gradients(optimizer)
            method.add_penalty_grad()
            optimizer.step()
            if not optimizer.step_was_skipped:  # by a gradient scaler, which met infinite gradients
                method.after_step(optimizer)
            optimizer.zero_grad()
    return value.detach()
