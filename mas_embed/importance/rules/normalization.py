"""The rules of normalization layers, `y = w * x_hat + b`, where `x_hat` depends on the sample alone.

N samples, C channels, L positions (all other dimensions), S the shape of the parameters.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.importance.rules.memory import accumulation_dtype, sum_of_powers
from mas_embed.importance.rules.registry import rule


@rule(nn.BatchNorm1d, min_ndim=2, applies=lambda layer: layer.running_mean is not None)
@rule(nn.BatchNorm2d, min_ndim=4, applies=lambda layer: layer.running_mean is not None)
@rule(nn.BatchNorm3d, min_ndim=5, applies=lambda layer: layer.running_mean is not None)
def batch_norm(
    layer: nn.BatchNorm2d, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Normalizes by the running statistics (eval mode): `x_hat = (x - running_mean) / sqrt(running_var + eps)`."""
    dtype, (num_samples, channels) = accumulation_dtype(grad_output), input.shape[:2]
    assert layer.running_mean is not None and layer.running_var is not None
    mean, variance = (statistic.to(dtype).repeat(num_samples) for statistic in (layer.running_mean, layer.running_var))
    # The kernel that autograd uses, on a view in which every channel of every sample is a separate channel
    delta, x = (tensor.detach().to(dtype).reshape(1, num_samples * channels, -1) for tensor in (grad_output, input))
    # In eval mode the statistics of the batch are empty tensors; the weight only sets the dtype and the device of the gradients
    weight, unused = torch.ones_like(mean), mean.new_empty(0)
    _, *gradients = torch.ops.aten.native_batch_norm_backward(
        delta, x, weight, mean, variance, unused, unused, False, layer.eps, [False, True, True]
    )
    return {
        name: sum_of_powers(gradient.view(num_samples, channels), exponent)
        for name, gradient in zip(("weight", "bias"), gradients, strict=True)
        if name in names
    }


@rule(nn.GroupNorm, min_ndim=2)
def group_norm(
    layer: nn.GroupNorm, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Normalizes by the statistics over the channels of a group and all positions."""
    dtype = accumulation_dtype(grad_output)
    normalized = F.group_norm(input.detach().to(dtype), layer.num_groups, eps=layer.eps)
    return _by_channel(normalized, grad_output.to(dtype), exponent, names)


@rule(nn.InstanceNorm1d, min_ndim=3, applies=lambda layer: layer.running_mean is None)
@rule(nn.InstanceNorm2d, min_ndim=4, applies=lambda layer: layer.running_mean is None)
@rule(nn.InstanceNorm3d, min_ndim=5, applies=lambda layer: layer.running_mean is None)
def instance_norm(
    layer: nn.InstanceNorm2d, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Normalizes by the statistics over all positions of a channel."""
    dtype = accumulation_dtype(grad_output)
    return _by_channel(F.instance_norm(input.detach().to(dtype), eps=layer.eps), grad_output.to(dtype), exponent, names)


@rule(nn.LayerNorm, min_ndim=2, num_feature_dims=lambda layer: len(layer.normalized_shape))
def layer_norm(
    layer: nn.LayerNorm, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Normalizes by the statistics over the last dimensions, which are the dimensions of the parameters."""
    dtype = accumulation_dtype(grad_output)
    normalized = F.layer_norm(input.detach().to(dtype), layer.normalized_shape, eps=layer.eps)
    return _by_element(layer, normalized, grad_output.to(dtype), exponent, names)


@rule(nn.RMSNorm, min_ndim=2, num_feature_dims=lambda layer: len(layer.normalized_shape))
def rms_norm(
    layer: nn.RMSNorm, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Normalizes as `layer_norm` does, but without subtracting the mean."""
    dtype = accumulation_dtype(grad_output)
    # The default of torch: the eps of the dtype that it computes in, which is float32 for half precision
    eps = layer.eps if layer.eps is not None else torch.finfo(accumulation_dtype(input)).eps
    normalized = F.rms_norm(input.detach().to(dtype), list(layer.normalized_shape), eps=eps)
    return _by_element(layer, normalized, grad_output.to(dtype), exponent, names)


def _by_channel(normalized: Tensor, delta: Tensor, exponent: int, names: Collection[str]) -> dict[str, Tensor]:
    """The sums for parameters [C] of a layer with inputs [N, C, ...]."""
    normalized_NCL, delta_NCL = (x.flatten(2) if x.ndim > 2 else x.unsqueeze(2) for x in (normalized, delta))
    sums = {}
    if "weight" in names:
        gradient_NC = normalized_NCL.mul_(delta_NCL).sum(2)
        sums["weight"] = sum_of_powers(gradient_NC, exponent)
    if "bias" in names:
        sums["bias"] = sum_of_powers(delta_NCL.sum(2), exponent)
    return sums


def _by_element(
    layer: nn.LayerNorm | nn.RMSNorm, normalized: Tensor, delta: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """The sums for parameters [S] of a layer with inputs [N, ..., S]."""
    size = len(layer.normalized_shape)
    num_positions = delta.shape[1 : delta.ndim - size].numel()

    def total(products: Tensor) -> Tensor:
        gradient_NS = products.reshape(len(products), num_positions, *layer.normalized_shape).sum(1)
        return sum_of_powers(gradient_NS, exponent)

    sums = {"weight": total(delta * normalized)} if "weight" in names else {}
    return sums | ({"bias": total(delta)} if "bias" in names else {})
