"""Tensors that methods store for the parameters of a model, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.runtime.sharding import sharded_like


def copy_to_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors of a state, by parameter name, each on the device of its parameter, and sharded as that is.

    Raises:
        UserError: the model does not have one of the parameters, or has it with another shape; the message names it. A
            parameter of the model that the state lacks is not an error.
    """
    parameters, copies = dict(model.named_parameters()), {}
    for name, tensor in state.items():
        if name not in parameters:
            raise UserError(
                f"the state has a parameter '{name}' that the model does not have; load it with the model that it was saved with"
            )
        if parameters[name].shape != tensor.shape:
            raise UserError(
                f"parameter '{name}' has shape {list(parameters[name].shape)} but {list(tensor.shape)} in the state"
            )
        copies[name] = sharded_like(tensor, parameters[name])
    return copies


@torch.no_grad()
def write_to_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of a model, by parameter name.

    Raises:
        UserError: the model no longer has one of the parameters; the message names it.
    """
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        if name not in parameters:
            raise UserError(
                f"the model no longer has the parameter '{name}', whose value the method stores; make the method anew"
            )
        parameters[name].copy_(value)


def weighted_mean(mean: Tensor, value: Tensor, *, weight: Tensor, total: Tensor) -> Tensor:
    """A weighted mean after one more value is included: `mean + (value - mean) weight / total`.

    Args:
        mean: the weighted mean of the earlier values.
        value: the new value.
        weight: the weight of the new value, >= 0, broadcast to its shape.
        total: the sum of the weights of all values, including the new one. Where it is 0, the result is the new value.
    """
    share = torch.where(total > 0, weight / total, 1.0).to(value.device)
    mean = mean.to(value.device)
    return (mean + share * (value - mean)).to(value.dtype)
