"""The rules of convolutions, `y = conv(x, W) + b`, and of transposed convolutions, in one to three dimensions.

They support every stride, padding, dilation, number of groups and padding mode. N samples, C input channels, L positions of
the output, O output channels, P entries of a patch.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.importance.rules.absolute_products import can_compute, sum_absolute_products
from mas_embed.importance.rules.memory import accumulation_dtype, block_bytes, sample_blocks, scratch, sum_of_powers
from mas_embed.importance.rules.registry import rule

# These limits were measured. For the compiled code:
MAX_POSITIONS = 2500  # of the output; with more of them PyTorch's backward pass of the layer is as fast
# For PyTorch's matrix products on the CPU:
MAX_PATCH_BYTES = 2**20  # of one sample; larger patches would leave a core's cache before they are used
MAX_CHANNELS = 64  # of the output per matrix product; more would not fit a processor's cache, fewer would be slower

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@rule(nn.Conv1d, min_ndim=3)
@rule(nn.Conv2d, min_ndim=4)
@rule(nn.Conv3d, min_ndim=5)
def convolution(
    layer: Convolution, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Adds up blocks of samples, so that the per-sample gradients are never all in memory; `_weight` computes them."""
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
    """Works as `convolution`; the output padding follows from the sizes of the input and the output."""
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
    return {"bias": sum_of_powers(gradient_NO, exponent)}


def _padded(layer: Convolution, input: Tensor) -> tuple[Tensor, list[int]]:
    """The input, padded if the kernel does not support the padding, and the zero padding that is left to the kernel."""
    if layer.padding_mode != "zeros":
        # As in the forward of the layer, which stores the amounts in the order of F.pad, with the last dimension first
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
    """Uses products of patches where they are faster, and otherwise PyTorch's backward pass of the layer for each sample."""
    dtype = accumulation_dtype(grad_output)
    input, grad_output = input.to(dtype), grad_output.to(dtype)
    if isinstance(layer, Convolution) and layer.groups == 1:
        num_positions, patch = grad_output.shape[2:].numel(), layer.weight[0].numel()
        compiled = num_positions <= MAX_POSITIONS and can_compute(input)
        largest = block_bytes(input.device) if input.is_cuda else MAX_PATCH_BYTES
        if compiled or num_positions * patch * input.element_size() <= largest:
            patches = _patches(layer, _channels_last(input, padding), grad_output.shape[2:])
            summed = (sum_absolute_products if compiled else _sum_by_bmm)(grad_output, patches, exponent)
            return summed.view(layer.out_channels, *layer.kernel_size, -1).movedim(-1, 1)
    weight = layer.weight.detach().to(dtype)
    total = torch.zeros_like(weight)
    # A CPU is slow with many groups, a GPU with many calls
    size = weight.numel() * weight.element_size() if input.is_cuda else block_bytes(input.device)
    for block in sample_blocks(len(input), size, input.device):
        # Every sample of the block has groups of its own, so that the gradient of the repeated weight is that of each sample
        num_samples = len(input[block])
        _, gradient, _ = torch.ops.aten.convolution_backward(
            grad_output[block].flatten(0, 1).unsqueeze(0),
            input[block].flatten(0, 1).unsqueeze(0),
            weight.repeat(num_samples, *[1] * (weight.ndim - 1)) if num_samples > 1 else weight,
            None,
            list(layer.stride),
            padding,
            list(layer.dilation),
            layer.transposed,
            output_padding,
            num_samples * layer.groups,
            [False, True, False],
        )
        total += sum_of_powers(gradient.unflatten(0, (num_samples, len(weight))), exponent)
    return total


def _channels_last(input: Tensor, padding: list[int]) -> Tensor:
    """The input [N, C, *sizes], zero-padded, as [N, *padded sizes, C]; the input is copied once."""
    moved, sizes = input.movedim(1, -1), input.shape[2:]
    padded_sizes = [size + 2 * amount for size, amount in zip(sizes, padding, strict=True)]
    padded = scratch("padded", (len(input), *padded_sizes, input.shape[1]), input)
    if any(padding):
        padded.zero_()
    unpadded = padded
    for dim, (size, amount) in enumerate(zip(sizes, padding, strict=True), start=1):
        unpadded = unpadded.narrow(dim, amount, size)
    unpadded.copy_(moved)
    return padded


def _patches(layer: Convolution, padded: Tensor, positions: torch.Size) -> Tensor:
    """The patch under the kernel at every position, as a view [N, *positions, *kernel size, C].

    The entries of one row of the kernel are contiguous if the dilation is 1.
    """
    sample_stride, *strides, channel_stride = padded.stride()
    position_strides = [size * stride for size, stride in zip(strides, layer.stride, strict=True)]
    kernel_strides = [size * dilation for size, dilation in zip(strides, layer.dilation, strict=True)]
    shape = (len(padded), *positions, *layer.kernel_size, padded.shape[-1])
    all_strides = (sample_stride, *position_strides, *kernel_strides, channel_stride)
    return padded.as_strided(shape, all_strides, padded.storage_offset())


def _sum_by_bmm(grad_output: Tensor, patches: Tensor, exponent: int) -> Tensor:
    """`sum_n |delta_n patches_n|^exponent` [O, P] by batched matrix products with copies of the patches."""
    delta_NOL = grad_output.flatten(2)
    num_samples, out_channels, num_positions = delta_NOL.shape
    patch = patches[0].numel() // num_positions
    total = scratch("total", (out_channels, patch), patches).zero_()
    num_channels = out_channels if patches.is_cuda else min(out_channels, MAX_CHANNELS)  # of a matrix product
    largest = max(num_positions, num_channels) * patch * patches.element_size()
    for block in sample_blocks(num_samples, largest, patches.device):
        view = patches[block]
        patches_NLP = scratch("patches", view.shape, view).copy_(view).view(len(view), num_positions, patch)
        for start in range(0, out_channels, num_channels):
            delta = delta_NOL[block, start : start + num_channels]
            gradient = scratch("gradient", (len(delta), delta.shape[1], patch), patches)
            torch.bmm(delta, patches_NLP, out=gradient)
            total[start : start + num_channels] += sum_of_powers(gradient, exponent)
    return total
