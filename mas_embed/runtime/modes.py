"""Context managers for eval mode, after which the model is exactly as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mas_embed.runtime.forward import device_of


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode for the body of the `with` statement.

    Afterwards, also after an exception, modes, buffers, attributes of modules and random states are restored.
    """
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    # Embedding tables with `max_norm` rescale their weights in every forward pass
    tables: list[Any] = [module.weight for module in modules if getattr(module, "max_norm", None) is not None]
    rows = [(table, table.detach().clone()) for table in tables]
    device, was_training = device_of(model), model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)  # runs an overridden `train`, if any; the mode of each module is restored below
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
    """`eval_mode` with autograd enabled, even inside `torch.no_grad` or inference mode."""
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        _make_differentiable(model)
        yield


def _make_differentiable(model: nn.Module) -> None:
    """Puts recurrent networks on a GPU in train mode without dropout: the same function, which cuDNN differentiates only so."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and any(parameter.is_cuda for parameter in module.parameters()):
            module.training, module.dropout = True, 0.0
