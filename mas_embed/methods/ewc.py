"""Elastic Weight Consolidation, in which importance is the Fisher information of the training loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mas_embed.importance import Importance
from mas_embed.methods.base import METHODS, Loss
from mas_embed.methods.elastic import Elastic
from mas_embed.methods.fisher import Fisher, check_loss, estimate_fisher
from mas_embed.methods.parameter_tensors import weighted_mean
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.forward import Embed, check_embed

Mode = Literal["separate", "online"]


@METHODS.register("ewc")
class EWC(Elastic):
    """Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017): `strength * sum_k sum_p F_kp (theta_p - theta*_kp)^2`.

    F_k is the diagonal Fisher information of the training loss on split k, and theta*_k are the parameters at the end of
    split k. `estimate_fisher` defines the Fisher information of a loss over pairs. The paper's factor is `lambda / 2`, so its
    lambda is twice this strength.

    The mode "separate" is the sum over all earlier splits k, stored as one quadratic function: with `F = sum_k F_k` and
    `a = sum_k F_k theta*_k / F`, the sum equals `F (theta - a)^2` plus a constant, because both have the second derivative 2F
    and their minimum at a. `penalty()` leaves the constant out. The mode "online" (Schwarz et al., ICML 2018) has one running
    Fisher information, `decay * old + new`, and one anchor, the parameters at the end of the last split.

    Args:
        model: any module that embeds a batch as [N, D].
        loss: the loss whose Fisher information is taken, `(embeddings, labels, mined) -> Tensor []` or
            `(embeddings, labels) -> Tensor []`, without trainable parameters. In a config it is the training loss, unless the
            method names another one. A loss with a margin can reach zero, and then has no gradient; name a smooth loss in that
            case, `{name: ewc, loss: MultiSimilarityLoss}`.
        strength: half the paper's lambda, >= 0.
        fisher: "sample" squares the gradient of every sample, which is the definition; "batch" squares the gradient of every
            batch, as many implementations do.
        mode: "separate" or "online".
        decay: gamma of online EWC, from 0 to 1.
        normalize: whether importance is scaled to a mean of 1, see `Elastic`.
        decoupled: whether the parameters are pulled after the optimizer's step instead of through the gradient.
        embed: replaces `model(input)` in the estimate of importance: `(model, input) -> Tensor [N, D]`, or the name of a
            method of the model.

    Raises:
        UserError: the loss has trainable parameters; or, from `consolidate`, batches have no labels.
    """

    consolidates_shares = True

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
        check_embed(model, embed)
        self.loss, self.fisher, self.mode, self.embed = loss, fisher, mode, embed

    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The Fisher information of the split, estimated from batches of `(inputs, labels)`."""
        return estimate_fisher(self.model, batches, loss=self.loss, fisher=self.fisher, embed=self.embed)

    def _new_anchor(self, name: str, parameter: Tensor, new: Tensor, total: Tensor) -> Tensor:
        """In the mode "separate", the mean of the parameters after each split, weighted by their Fisher information."""
        if self.mode == "online" or name not in self.anchor:
            return parameter.clone()
        return weighted_mean(self.anchor[name], parameter, weight=new, total=total)
