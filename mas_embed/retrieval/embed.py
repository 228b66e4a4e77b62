"""Embedding a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.forward import Embed, batch_to, device_of, embed_batch, evaluating


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Any], *, embed: Embed | str | None = None) -> Tensor:
    """The embeddings [N, D] of all batches in order, taken in eval mode without gradients, on the CPU.

    Args:
        model: the embedding model; left in the mode in which it was.
        batches: see `estimate_importance`.
        embed: how to embed instead of `model(input)`: `(model, batch) -> Tensor [N, D]`, or the name of a method of the
            model.
    """
    device = device_of(model)
    with evaluating(model):
        embedded = [embed_batch(model, batch_to(batch, device), embed).cpu() for batch in batches]
    if not embedded:
        raise UserError("there is nothing to embed: batches is empty")
    return torch.cat(embedded)
