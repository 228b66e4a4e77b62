"""Local MAS: importance is what a layer's input and output have in common, from unlabeled data and forward passes only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mas_embed.importance import Importance, estimate_local_importance
from mas_embed.methods.base import METHODS
from mas_embed.methods.elastic import Accumulation, Elastic
from mas_embed.runtime.forward import Embed


@METHODS.register("local_mas")
class LocalMAS(Elastic):
    """l-MAS (Aljundi et al., ECCV 2018, section 4.3): MAS with Hebbian importance, `Omega_ij = 1/N sum_n x_i y_j`.

    See `estimate_local_importance` for the definition. Only linear layers and convolutions are protected.

    Args:
        model: any module that embeds a batch as [N, D], with a trainable linear layer or convolution.
        strength: lambda of the paper, >= 0. Its scale is not that of MAS: choose it on held-out data.
        accumulation: of importance over the splits, see `Elastic`.
        decay: of the old importance under "decay".
        normalize: scale importance to a mean of 1.
        decoupled: pull after the optimizer's step instead of in the gradient.
        embed: how to embed instead of `model(input)` for importance.

    Raises:
        UserError: from `consolidate`, if no layer has local importance.
    """

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
        self.embed = embed

    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The mean product of what comes into a weight and what goes out; takes nothing from labels."""
        return estimate_local_importance(self.model, batches, embed=self.embed)
