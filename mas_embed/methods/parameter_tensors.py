"""What methods keep of a model's parameters between splits, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError


def copy_to_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors by parameter name, each on its parameter's device.

    Raises:
        UserError: names a parameter that the model does not have, or has in another shape. Parameters of the model that the
            state lacks are not an error.
    """
    own, adopted = dict(model.named_parameters()), {}
    for name, tensor in state.items():
        if name not in own:
            raise UserError(
                f"the state protects a parameter '{name}' that the model does not have; load it into the model it is of"
            )
        if own[name].shape != tensor.shape:
            raise UserError(
                f"parameter '{name}' has shape {list(own[name].shape)} but {list(tensor.shape)} in the state"
            )
        adopted[name] = tensor.to(own[name].device, copy=True)
    return adopted


def weighted_mean(mean: Tensor, value: Tensor, *, weight: Tensor, total: Tensor) -> Tensor:
    """A weighted mean of tensors after one more value: `mean + (value - mean) weight / total`.

    Args:
        mean: of the values before.
        value: the new one.
        weight: its weight >= 0, which broadcasts with it.
        total: the weights of all values, the new one's among them; where it is 0 the new value is taken.
    """
    share = torch.where(total > 0, weight / total, 1.0).to(value.device)
    mean = mean.to(value.device)
    return (mean + share * (value - mean)).to(value.dtype)
