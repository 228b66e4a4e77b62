"""The rule of `nn.Embedding`, which looks up rows of a table.

N samples, T positions (all dimensions but the first), V rows, D columns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from mas_embed.importance.rules.memory import absolute_power, accumulation_dtype
from mas_embed.importance.rules.registry import rule


@rule(nn.Embedding, min_ndim=1, applies=lambda layer: not layer.sparse and not layer.scale_grad_by_freq)
def embedding(
    layer: nn.Embedding, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """The per-sample gradient of a row is the sum over the positions that look it up; other rows are not formed. O(N T D)."""
    row_NT = input.reshape(len(input), -1)
    delta = grad_output.to(accumulation_dtype(grad_output)).reshape(row_NT.numel(), layer.embedding_dim)
    # One number for every pair of sample and row; positions with equal pairs are added before the absolute value is taken
    pair = (torch.arange(len(input), device=input.device)[:, None] * layer.num_embeddings + row_NT).flatten()
    pairs, pair_index = pair.unique(return_inverse=True)
    gradient = delta.new_zeros(len(pairs), layer.embedding_dim).index_add_(0, pair_index, delta)
    total = delta.new_zeros(layer.num_embeddings, layer.embedding_dim)
    total.index_add_(0, pairs % layer.num_embeddings, absolute_power(gradient, exponent))
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0  # torch computes no gradient for this row
    return {"weight": total}


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
