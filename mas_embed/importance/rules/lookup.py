"""The rule of `nn.Embedding`, which looks up rows of a table.

N samples, T positions (all dimensions but the first), V rows, D columns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from mas_embed.importance.rules.memory import absolute_power, accumulation_dtype
from mas_embed.importance.rules.registry import rule


@rule(
    nn.Embedding,
    min_ndim=1,
    applies=lambda layer: not layer.sparse and not layer.scale_grad_by_freq,
    num_feature_dims=lambda layer: 0,
)
def embedding(
    layer: nn.Embedding, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """The per-sample gradient of a row is the sum over the positions that look it up; other rows are not formed. O(N T D)."""
    row_NT = input.reshape(len(input), -1)
    delta = grad_output.to(accumulation_dtype(grad_output)).reshape(row_NT.numel(), layer.embedding_dim)
    sample_index = torch.arange(len(input), device=input.device).repeat_interleave(row_NT.shape[1])
    total = sum_over_pairs(layer.num_embeddings, sample_index, row_NT.flatten(), delta, exponent)
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0  # torch computes no gradient for this row
    return {"weight": total}


def sum_over_pairs(num_rows: int, sample_index: Tensor, row_index: Tensor, delta: Tensor, exponent: int) -> Tensor:
    """The sum over samples [V, D] of `|g_n|^exponent`, where g_n adds up the deltas of the look-ups of sample n by row.

    Args:
        num_rows: V.
        sample_index: [L], the sample of each look-up.
        row_index: [L], the row of each look-up.
        delta: [L, D], the gradient with respect to the result of each look-up, in float32 or wider.
        exponent: 1 or 2.
    """
    # One number for every pair of sample and row; look-ups with equal pairs are added before the absolute value is taken
    pairs, pair_index = (sample_index * num_rows + row_index).unique(return_inverse=True)
    gradient = delta.new_zeros(len(pairs), delta.shape[1]).index_add_(0, pair_index, delta)
    total = delta.new_zeros(num_rows, delta.shape[1])
    return total.index_add_(0, pairs % num_rows, absolute_power(gradient, exponent))


def shared_lookup(layer: nn.Embedding, input: Tensor, gradient: Tensor, exponent: int) -> Tensor:
    """The sum over samples [V, D] for a look-up that all samples share, such as that of the positions 0 to T - 1.

    Args:
        layer: the table.
        input: the rows that were looked up, in any shape.
        gradient: [N, *input.shape, D], for every sample the gradient with respect to the result of the look-up.
        exponent: 1 or 2.
    """
    rows, row_index = input.flatten().unique(return_inverse=True)
    delta = gradient.to(accumulation_dtype(gradient)).reshape(len(gradient), input.numel(), layer.embedding_dim)
    # Positions that look up the same row are added before the absolute value is taken
    by_row = delta.new_zeros(len(gradient), len(rows), layer.embedding_dim).index_add_(1, row_index, delta)
    total = delta.new_zeros(layer.num_embeddings, layer.embedding_dim)
    total[rows] = absolute_power(by_row, exponent).sum(0)
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0  # torch computes no gradient for this row
    return total
