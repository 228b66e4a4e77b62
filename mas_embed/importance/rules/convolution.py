"""`y = conv(x, W) + b`.

N samples, G groups, C in-channels x kernel positions of a group, O out-channels of a group, L positions.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.importance.rules.blocks import absolute_power, accumulation_dtype, sample_blocks
from mas_embed.importance.rules.registry import rule


@rule(nn.Conv2d, min_ndim=4)
def conv2d(
    layer: nn.Conv2d, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Per-sample gradients by unfolding: `g_n = delta_n patches_n^T`; any stride, dilation, groups and padding mode."""
    dtype = accumulation_dtype(grad_output)
    delta = grad_output.to(dtype)
    sums = {}
    if "weight" in names:
        sums["weight"] = _weight(layer, _pad(layer, input.detach().to(dtype)), delta, exponent)
    if "bias" in names:
        sums["bias"] = absolute_power(delta.sum((2, 3)), exponent).sum(0)
    return sums


def _pad(layer: nn.Conv2d, input: Tensor) -> Tensor:
    """The input as the kernel sees it: padded in the layer's mode, so that what follows needs no padding."""
    if layer.padding_mode != "zeros":
        # As the layer's own forward does; amounts are kept last dimension first, as F.pad takes them
        return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    if layer.padding == "valid":
        return input
    amounts: list[int] = []
    for index in reversed(range(2)):
        if layer.padding == "same":
            total = layer.dilation[index] * (layer.kernel_size[index] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [int(layer.padding[index])] * 2
    return F.pad(input, amounts)


def _weight(layer: nn.Conv2d, padded: Tensor, delta: Tensor, exponent: int) -> Tensor:
    groups, (out_channels, channels, *kernel) = layer.groups, layer.weight.shape
    patch, positions = channels * kernel[0] * kernel[1], delta.shape[2] * delta.shape[3]
    total = torch.zeros(groups, out_channels // groups, patch, dtype=delta.dtype, device=delta.device)
    per_sample = groups * patch * max(positions, out_channels // groups) * delta.element_size()
    for block in sample_blocks(len(delta), per_sample):
        patches = F.unfold(padded[block], layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
        patches_NGCL = patches.view(len(patches), groups, patch, positions)
        delta_NGOL = delta[block].reshape(len(patches), groups, out_channels // groups, positions)
        total += absolute_power(delta_NGOL @ patches_NGCL.mT, exponent).sum(0)
    return total.view(layer.weight.shape)
