"""The optimizers and learning rate schedulers of torch as components, and the optimizer of a model."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from mas_embed.registry import Registry
from mas_embed.training.recipe import MakeOptimizer


def _public_subclasses(module: ModuleType, base: type) -> dict[str, Callable[..., Any]]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}
    return {name: value for name, value in found.items() if value is not base and not name.startswith("_")}


OPTIMIZERS = Registry("optimizer", library=lambda: _public_subclasses(torch.optim, torch.optim.Optimizer))
SCHEDULERS = Registry("scheduler", library=lambda: _public_subclasses(lr_scheduler, lr_scheduler.LRScheduler))


def make_optimizer(model: nn.Module, others: list[nn.Parameter], make: MakeOptimizer) -> torch.optim.Optimizer:
    """An optimizer of all trainable parameters of a model, and of others, such as those of its loss.

    Where a model has `parameter_groups(lr)`, that says how fast each of its parts learns at the optimizer's learning rate.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make([*parameters, *others])
    parameter_groups = getattr(model, "parameter_groups", None)
    if not callable(parameter_groups):
        return optimizer
    groups = parameter_groups(optimizer.defaults["lr"])
    return make([*groups, {"params": others}] if others else groups)
