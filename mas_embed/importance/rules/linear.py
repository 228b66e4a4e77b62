"""The rule of `nn.Linear`, `y = x W^T + b`.

N samples, T positions (all dimensions between the first and the last), I/O in/out features.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # output layer of attention

from mas_embed.importance.rules.absolute_products import can_compute, sum_absolute_products
from mas_embed.importance.rules.memory import accumulation_dtype, sample_blocks, sum_of_powers
from mas_embed.importance.rules.registry import rule

MAX_POSITIONS = 64  # for the compiled code; with more of them PyTorch's matrix products are as fast (measured)


@rule(nn.Linear, NonDynamicallyQuantizableLinear, min_ndim=2, num_feature_dims=lambda layer: 1)
def linear(
    layer: nn.Linear, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """The per-sample gradient is `g_n = delta_n^T x_n`, summed over T; O(N T I O) time."""
    dtype = accumulation_dtype(grad_output)
    input_NTI = input.detach().reshape(len(input), -1, layer.in_features).to(dtype)
    delta_NTO = grad_output.reshape(len(input), -1, layer.out_features).to(dtype)
    sums = {}
    if "weight" in names:
        sums["weight"] = sum_over_samples(input_NTI, delta_NTO, exponent)
    if "bias" in names:
        sums["bias"] = sum_of_powers(delta_NTO.sum(1), exponent)
    return sums


def sum_over_samples(input_NTI: Tensor, delta_NTO: Tensor, exponent: int) -> Tensor:
    """`sum_n |delta_n^T x_n|^exponent` [O, I]."""
    if input_NTI.shape[1] == 1:
        # With one position, |delta_o x_i|^p = |delta_o|^p |x_i|^p, so the sum over samples is one matrix product.
        return delta_NTO[:, 0].abs().pow(exponent).T @ input_NTI[:, 0].abs().pow(exponent)
    if input_NTI.shape[1] <= MAX_POSITIONS and can_compute(delta_NTO):
        return sum_absolute_products(delta_NTO.mT, input_NTI.contiguous(), exponent)
    size = input_NTI.shape[2] * delta_NTO.shape[2]
    total = torch.zeros(delta_NTO.shape[2], input_NTI.shape[2], dtype=delta_NTO.dtype, device=delta_NTO.device)
    for block in sample_blocks(len(input_NTI), size * delta_NTO.element_size(), delta_NTO.device):
        total += sum_of_powers(torch.bmm(delta_NTO[block].mT, input_NTI[block]), exponent)
    return total
