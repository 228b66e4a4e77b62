"""One optimizer step, and one split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mas_embed.errors import RunError
from mas_embed.methods import Method

Loss = Callable[..., Tensor]


def training_step(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    loss: Loss,
    miner: Callable[[Tensor, Tensor], Any] | None,
    method: Method,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> Tensor:
    """Learns one batch under the method's penalty; returns the loss of the batch, without the penalty, detached."""
    embeddings = model(inputs)
    value = loss(embeddings, labels, miner(embeddings, labels) if miner is not None else None)
    accelerator.backward(value)
    accelerator.unscale_gradients(optimizer)
    method.add_penalty_grad()
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()


def train_epoch(model: nn.Module, batches: Iterable[tuple[Any, Tensor]], **step: Any) -> float:
    """One pass over a split; returns the mean loss of its batches. `step` goes to `training_step`.

    Raises:
        RunError: the loss is not finite.
    """
    model.train()
    losses = [training_step(model, inputs, labels, **step) for inputs, labels in batches]
    mean_loss = float(torch.stack(losses).mean())
    if not math.isfinite(mean_loss):
        raise RunError(f"training diverged, the loss is {mean_loss}: lower the learning rate, or the method's strength")
    return mean_loss
