"""Memory Aware Synapses, in which importance is the sensitivity of the embeddings, estimated from unlabeled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from mas_embed.importance import Importance, estimate_importance
from mas_embed.importance.outputs import Output, resolve_output
from mas_embed.methods.base import METHODS
from mas_embed.methods.elastic import Accumulation, Elastic
from mas_embed.runtime.forward import Embed, check_embed


@METHODS.register("mas")
class MAS(Elastic):
    """Memory Aware Synapses (Aljundi et al., ECCV 2018), with the penalty `strength * sum_p Omega_p (theta_p - theta*_p)^2`.

    Omega is the mean absolute per-sample gradient of the output, see `estimate_importance`. It is estimated when a split ends
    and added to the importance of the earlier splits. theta* are the parameters at the end of the last split.

    Args:
        model: any module that embeds a batch as [N, D].
        strength: lambda of the paper, >= 0. Its scale depends on the output, the model and the loss; choose it on held-out
            data.
        output: "squared_norm" (as in the paper), "vector", "projection" (for embeddings of unit length), or a callable, see
            `estimate_importance`.
        accumulation: how importance is accumulated over the splits: "sum" (as in the paper), "mean", "decay" or "max", see
            `Elastic`.
        decay: factor of the old importance under "decay", from 0 to 1.
        normalize: whether importance is scaled to a mean of 1, so that one strength suits any output, model and number of
            splits.
        decoupled: whether the parameters are pulled after the optimizer's step instead of through the gradient, which an
            adaptive optimizer would rescale.
        embed: replaces `model(input)` in the estimate of importance: `(model, input) -> Tensor [N, D]`, or the name of a
            method of the model, such as one that leaves out the final normalisation.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> mas = MAS(model, strength=10.0)
        >>> float(mas.penalty())
        0.0
        >>> importance = mas.consolidate([torch.randn(8, 2)])  # the first split ends
        >>> _ = model.weight.data.add_(0.1)  # the second split changes the weights
        >>> bool(mas.penalty() > 0)
        True
    """

    consolidates_shares = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        output: str | Output | Callable[[Tensor, Any], Tensor] = "squared_norm",
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
        self.output, self.embed = resolve_output(output), embed

    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The mean absolute per-sample gradient of the output; labels in the batches are ignored."""
        return estimate_importance(self.model, batches, output=self.output, embed=self.embed)
