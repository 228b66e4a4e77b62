"""The trainable parameters of a model, and a sum for each of them, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mas_embed.importance.rules.memory import accumulation_dtype
from mas_embed.runtime.forward import check_module


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad=True`, by name; raises `UserError` if the model is no module."""
    check_module(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def zero_sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor of zeros for every parameter, by name, in the parameter's shape and in float32 or wider."""
    return {
        name: torch.zeros_like(parameter, dtype=accumulation_dtype(parameter), requires_grad=False)
        for name, parameter in parameters.items()
    }
