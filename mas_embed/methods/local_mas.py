"""Local MAS, which estimates importance from the inputs and outputs of every layer in forward passes over unlabeled data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mas_embed.importance import Importance, estimate_local_importance
from mas_embed.methods.base import METHODS
from mas_embed.methods.elastic import Accumulation, Elastic
from mas_embed.runtime.forward import Embed, check_embed


@METHODS.register("local_mas")
class LocalMAS(Elastic):
    """l-MAS (Aljundi et al., ECCV 2018, section 4.3): MAS with Hebbian importance, `Omega_ij = 1/N sum_n x_i y_j`.

    x is the input of a layer and y its output after a ReLU, see `estimate_local_importance`. Only linear layers and
    convolutions are protected.

    Args:
        model: any module that embeds a batch as [N, D], with a trainable linear layer or convolution.
        strength: lambda of the paper, >= 0. Its scale differs from that of MAS; choose it on held-out data.
        accumulation: how importance is accumulated over the splits, see `Elastic`.
        decay: factor of the old importance under "decay", from 0 to 1.
        normalize: whether importance is scaled to a mean of 1, see `Elastic`.
        decoupled: whether the parameters are pulled after the optimizer's step instead of through the gradient.
        embed: replaces `model(input)` in the estimate of importance, see `MAS`.

    Raises:
        UserError: from `consolidate`, if the model has no trainable linear layer or convolution.
    """

    consolidates_shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        accumulation: Accumulation = "sum",
        decay: float = 0.9,
        normalize: bool = False,
        decoupled: bool = False,
        embed: Embed | str | None = None,
    ) -> None:
        super().__init__(
            model,
            strength=strength,
            accumulation=accumulation,
            decay=decay,
            normalize=normalize,
            decoupled=decoupled,
        )
        check_embed(model, embed)
        self.embed = embed

    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The Hebbian importance of linear layers and convolutions; labels in the batches are ignored."""
        return estimate_local_importance(self.model, batches, embed=self.embed)
