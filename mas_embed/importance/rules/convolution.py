"""`y = conv(x, W) + b`, in one to three dimensions, and its transpose; any stride, padding, dilation, groups and padding mode."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.importance.rules.blocks import absolute_power, accumulation_dtype, sample_blocks, scratch
from mas_embed.importance.rules.registry import rule

MAX_PATCH_BYTES = 2**20  # of one sample: more would leave a core's cache before they are used
MAX_CHANNELS = 64  # of the output in one matrix product: large enough for it, small enough for a processor's cache

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@rule(nn.Conv1d, min_ndim=3)
@rule(nn.Conv2d, min_ndim=4)
@rule(nn.Conv3d, min_ndim=5)
def convolution(
    layer: Convolution, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Sums over samples in blocks, of which none is kept; see `_weight` for how a sample's gradient is formed."""
    sums = _bias(grad_output, exponent, names)
    if "weight" in names:
        padded, padding = _padded(layer, input.detach())
        none = [0] * len(padding)
        sums["weight"] = _weight(layer, padded, grad_output, exponent, padding=padding, output_padding=none)
    return sums


@rule(nn.ConvTranspose1d, min_ndim=3)
@rule(nn.ConvTranspose2d, min_ndim=4)
@rule(nn.ConvTranspose3d, min_ndim=5)
def transposed_convolution(
    layer: TransposedConvolution, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """As `convolution`, with the output padding that made the output as large as it is."""
    sums = _bias(grad_output, exponent, names)
    if "weight" in names:
        padding: list[int] = [int(amount) for amount in layer.padding]
        geometry = zip(
            input.shape[2:],
            grad_output.shape[2:],
            layer.stride,
            padding,
            layer.dilation,
            layer.kernel_size,
            strict=True,
        )
        output_padding = [
            out - ((size - 1) * stride - 2 * amount + dilation * (kernel - 1) + 1)
            for size, out, stride, amount, dilation, kernel in geometry
        ]
        sums["weight"] = _weight(
            layer, input.detach(), grad_output, exponent, padding=padding, output_padding=output_padding
        )
    return sums


def _bias(grad_output: Tensor, exponent: int, names: Collection[str]) -> dict[str, Tensor]:
    if "bias" not in names:
        return {}
    gradient_NO = grad_output.flatten(2).sum(2, dtype=accumulation_dtype(grad_output))
    return {"bias": absolute_power(gradient_NO, exponent).sum(0)}


def _padded(layer: Convolution, input: Tensor) -> tuple[Tensor, list[int]]:
    """The input, padded if the kernel cannot do it itself, and the zeros that are left for the kernel to pad."""
    if layer.padding_mode != "zeros":
        # As the layer's own forward does; amounts are kept last dimension first, as F.pad takes them
        return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), [0] * (input.ndim - 2)
    if not isinstance(layer.padding, str):
        return input, list(layer.padding)
    if layer.padding == "valid":
        return input, [0] * (input.ndim - 2)
    totals = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return input, [total // 2 for total in totals]
    amounts = chain.from_iterable((total // 2, total - total // 2) for total in reversed(totals))
    return F.pad(input, list(amounts)), [0] * (input.ndim - 2)


def _weight(
    layer: Convolution | TransposedConvolution,
    input: Tensor,
    grad_output: Tensor,
    exponent: int,
    *,
    padding: list[int],
    output_padding: list[int],
) -> Tensor:
    """By patches for plain 2-d convolutions, unless they are many; else by the layer's own backward pass on each sample alone."""
    dtype = accumulation_dtype(grad_output)
    input, grad_output = input.to(dtype), grad_output.to(dtype)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and _patch_bytes(layer, grad_output) <= MAX_PATCH_BYTES:
        return _weight_by_patches(layer, _channels_last(input, padding), grad_output, exponent)
    weight = layer.weight.detach().to(dtype)
    total = torch.zeros_like(weight)
    for index in range(len(input)):
        _, gradient, _ = torch.ops.aten.convolution_backward(
            grad_output[index : index + 1],
            input[index : index + 1],
            weight,
            None,
            list(layer.stride),
            padding,
            list(layer.dilation),
            layer.transposed,
            output_padding,
            layer.groups,
            [False, True, False],
        )
        total += absolute_power(gradient, exponent)
    return total


def _channels_last(input: Tensor, padding: list[int]) -> Tensor:
    """The input [N, C, H, W] as [N, padded H, padded W, C], in one copy."""
    num_samples, channels, height, width = input.shape
    (rows, columns), moved = padding, input.permute(0, 2, 3, 1)
    if not any(padding):
        return moved.contiguous()
    padded = input.new_zeros(num_samples, height + 2 * rows, width + 2 * columns, channels)
    padded[:, rows : rows + height, columns : columns + width] = moved
    return padded


def _patch_bytes(layer: nn.Conv2d, grad_output: Tensor) -> int:
    """How large the patches of one sample are together."""
    return grad_output.shape[2:].numel() * layer.weight[0].numel() * grad_output.element_size()


def _weight_by_patches(layer: nn.Conv2d, padded_NHWC: Tensor, grad_output: Tensor, exponent: int) -> Tensor:
    """`g_n = delta_n patches_n` as matrix products; faster than the backward pass of one sample, above all a small one.

    Patches are cut from the input with its channels last, where a row of the kernel is one run of memory.
    """
    (out_channels, channels, *kernel), num_positions = layer.weight.shape, grad_output.shape[2:].numel()
    patch, delta_NOL = channels * kernel[0] * kernel[1], grad_output.flatten(2)
    total = scratch("total", (out_channels, patch), padded_NHWC).zero_()
    largest = max(num_positions, min(out_channels, MAX_CHANNELS)) * patch * padded_NHWC.element_size()
    for block in sample_blocks(len(padded_NHWC), largest):
        view = _patches(layer, padded_NHWC[block], grad_output.shape[2:])
        patches_NLP = scratch("patches", view.shape, padded_NHWC).copy_(view).view(len(view), num_positions, patch)
        for start in range(0, out_channels, MAX_CHANNELS):
            delta = delta_NOL[block, start : start + MAX_CHANNELS]
            gradient = scratch("gradient", (len(delta), delta.shape[1], patch), padded_NHWC)
            torch.bmm(delta, patches_NLP, out=gradient)
            total[start : start + MAX_CHANNELS] += absolute_power(gradient, exponent).sum(0)
    return total.view(out_channels, *kernel, channels).permute(0, 3, 1, 2)


def _patches(layer: nn.Conv2d, padded_NHWC: Tensor, positions: torch.Size) -> Tensor:
    """What the kernel sees at every position, as a view [N, height, width, kernel height, kernel width, C]."""
    sample, row, column, channel = padded_NHWC.stride()
    size = (len(padded_NHWC), *positions, *layer.kernel_size, padded_NHWC.shape[3])
    stride = (
        sample,
        row * layer.stride[0],
        column * layer.stride[1],
        row * layer.dilation[0],
        column * layer.dilation[1],
        channel,
    )
    return padded_NHWC.as_strided(size, stride, padded_NHWC.storage_offset())
