"""Eval mode for a while, with the model left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mas_embed.runtime.forward import device_of


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs its body with every module in eval mode; leaves modes, buffers, attributes and random states as they were."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    # Look-up tables with a largest norm scale their rows in every forward pass
    tables: list[Any] = [module.weight for module in model.modules() if getattr(module, "max_norm", None) is not None]
    rows = [(table, table.detach().clone()) for table in tables]
    device, was_training = device_of(model), model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)  # a model's own way back, where it has one; then each module's own mode
        for module, before in attributes:
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        with torch.no_grad():
            for buffer, version, content in buffers:
                if buffer._version != version:
                    buffer.copy_(content)
            for table, content in rows:
                table.copy_(content)


@contextmanager
def eval_mode_with_grad(model: nn.Module) -> Iterator[None]:
    """`eval_mode` with autograd enabled, also where the caller has disabled it."""
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        yield
