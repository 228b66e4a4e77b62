"""Elastic Weight Consolidation: importance is the Fisher information of the training loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mas_embed.importance import Importance
from mas_embed.methods.base import METHODS, Loss
from mas_embed.methods.checks import check_choice
from mas_embed.methods.elastic import Elastic
from mas_embed.methods.fisher import Fisher, check_loss, estimate_fisher
from mas_embed.methods.parameter_tensors import weighted_mean
from mas_embed.runtime.forward import Embed

Mode = Literal["separate", "online"]


@METHODS.register("ewc")
class EWC(Elastic):
    """Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017): `strength * sum_k sum_p F_kp (theta_p - theta*_kp)^2`.

    F_k is the diagonal Fisher information of the training loss on split k, see `estimate_fisher` for what that is where a
    loss is of pairs; theta*_k are the parameters at the end of split k. Deviates from the paper in the factor: it has
    `lambda / 2`, so its lambda is twice this strength.

    "separate" is the sum over all earlier splits k, kept as one quadratic: with `F = sum_k F_k` and
    `a = sum_k F_k theta*_k / F` it equals `F (theta - a)^2` and a constant, because both have the second derivative 2F and
    the same minimum a. `penalty()` leaves the constant out. "online" (Schwarz et al., ICML 2018) has one running Fisher,
    `decay * old + new`, and one anchor, the last parameters.

    Args:
        model: any module that embeds a batch as [N, D].
        loss: the training loss, `(embeddings, labels, mined) -> Tensor []`, without parameters of its own. In a config it is
            the config's, unless the method names another, as it should where the trained one has a margin and reaches zero:
            `{name: ewc, loss: MultiSimilarityLoss}`.
        strength: half the paper's lambda, >= 0.
        fisher: "sample" squares the gradient of every sample (the definition), "batch" that of a batch (common in ports).
        mode: "separate" or "online".
        decay: gamma of online EWC, from 0 to 1.
        normalize: scale importance to a mean of 1.
        decoupled: pull after the optimizer's step instead of in the gradient.
        embed: how to embed instead of `model(input)` for importance.

    Raises:
        UserError: the loss has parameters; or from `consolidate`, batches have no labels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        strength: float = 1.0,
        fisher: Fisher = "sample",
        mode: Mode = "separate",
        decay: float = 0.9,
        normalize: bool = False,
        decoupled: bool = False,
        embed: Embed | str | None = None,
    ) -> None:
        super().__init__(
            model,
            strength=strength,
            accumulation="decay" if mode == "online" else "sum",
            decay=decay,
            normalize=normalize,
            decoupled=decoupled,
        )
        check_loss(loss, "EWC")
        check_choice("fisher", fisher, get_args(Fisher))
        check_choice("mode", mode, get_args(Mode))
        self.loss, self.fisher, self.mode, self.embed = loss, fisher, mode, embed

    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The Fisher information of the split, from its `(inputs, labels)`."""
        return estimate_fisher(self.model, batches, loss=self.loss, fisher=self.fisher, embed=self.embed)

    def _anchored(self, name: str, parameter: Tensor, new: Tensor, total: Tensor) -> Tensor:
        """Under "separate" the mean of all splits' parameters, weighted by their Fisher information."""
        if self.mode == "online" or name not in self.anchor:
            return parameter.clone()
        return weighted_mean(self.anchor[name], parameter, weight=new, total=total)
