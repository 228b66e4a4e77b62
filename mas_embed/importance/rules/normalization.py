"""`y = w * x_hat + b`. N samples, C channels, L positions."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from mas_embed.importance.rules.blocks import absolute_power, accumulation_dtype
from mas_embed.importance.rules.registry import rule


@rule(nn.BatchNorm2d, min_ndim=4, applies=lambda layer: layer.running_mean is not None)
def batch_norm(
    layer: nn.BatchNorm2d, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Eval mode: `x_hat = (x - running_mean) / sqrt(running_var + eps)` does not depend on the batch."""
    dtype = accumulation_dtype(grad_output)
    delta_NCL = grad_output.to(dtype).flatten(2)
    sums = {}
    if "weight" in names:
        assert layer.running_mean is not None and layer.running_var is not None
        mean_C1, scale_C = layer.running_mean.to(dtype)[:, None], (layer.running_var.to(dtype) + layer.eps).rsqrt()
        centred_NCL = input.detach().to(dtype).flatten(2) - mean_C1
        gradient_NC = torch.einsum("ncl,ncl->nc", delta_NCL, centred_NCL) * scale_C
        sums["weight"] = absolute_power(gradient_NC, exponent).sum(0)
    if "bias" in names:
        sums["bias"] = absolute_power(delta_NCL.sum(2), exponent).sum(0)
    return sums
