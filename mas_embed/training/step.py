"""One split, one epoch, one optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mas_embed.data import Split
from mas_embed.errors import RunError
from mas_embed.methods import Method
from mas_embed.training.loading import MakeSampler, training_batches

Loss = Callable[..., Tensor]
Miner = Callable[[Tensor, Tensor], Any]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How a split is trained; see `train_sequence` for what each is."""

    loss: Loss
    miner: Miner | None
    sampler: MakeSampler | None
    optimizer: MakeOptimizer
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(loss, nn.Module):
        parameters += loss.to(accelerator.device).parameters()
    batches, optimizer = accelerator.prepare(
        training_batches(split.train, batch_size=recipe.batch_size, sampler=recipe.sampler),
        recipe.optimizer(parameters),
    )
    optimizer.zero_grad()  # what a caller's own backward pass may have left
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
        on_event({"event": "epoch", "epoch": epoch, "loss": mean_loss, "num_batches": len(batches)})


def training_step(
    model: nn.Module,
    batch: tuple[Any, Tensor],
    *,
    loss: Loss,
    miner: Miner | None,
    method: Method,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> Tensor:
    """Learns one batch under the method's penalty; returns the batch's loss without the penalty, detached."""
    inputs, labels = batch
    embeddings = model(inputs)
    value = loss(embeddings, labels, miner(embeddings, labels) if miner is not None else None)
    accelerator.backward(value)
    accelerator.unscale_gradients(optimizer)
    method.add_penalty_grad()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()
