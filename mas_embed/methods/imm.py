"""Incremental Moment Matching: the models of the splits are averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.importance.parameters import trainable_parameters
from mas_embed.methods.base import METHODS, Loss, Method
from mas_embed.methods.checks import check_choice
from mas_embed.methods.fisher import check_loss, estimate_fisher
from mas_embed.methods.parameter_tensors import copy_to_parameters, weighted_mean
from mas_embed.runtime.forward import Embed

Mode = Literal["mean", "mode"]
Start = Literal["last", "average"]


@METHODS.register("imm")
class IMM(Method):
    """Incremental Moment Matching (Lee et al., NeurIPS 2017): parameters are averaged over the models of all splits.

    "mean" is the plain mean, `1/K sum_k theta_k`; "mode" weights every parameter by the Fisher information of its split's
    training loss, `sum_k F_k theta_k / sum_k F_k` (see `estimate_fisher`), and takes the last split's where that is 0.
    `consolidate` puts the average into the model, which is what is judged and used between splits. With `start="last"`
    `begin_split` then puts the last split's own parameters back, from which the next is trained (the paper's weight
    transfer); with "average" it is trained from the average, which is not the paper's. All splits weigh the same; of the
    paper's other aids (L2 transfer, drop transfer) there is none. Buffers, such as running statistics, stay those of the last
    split. A parameter that is frozen in a split is left out of it.

    Args:
        model: the embedding model that is trained.
        mode: "mean" or "mode".
        start: where the next split is trained from, "last" or "average".
        loss: the training loss, for "mode": `(embeddings, labels, mined) -> Tensor []`. In a config it is the config's,
            unless the method names another, see `EWC`.
        embed: how to embed instead of `model(input)`, for "mode".

    Raises:
        UserError: "mode" without a loss, or with one that has parameters; or from `consolidate`, batches have no labels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "mean",
        start: Start = "last",
        loss: Loss | None = None,
        embed: Embed | str | None = None,
    ) -> None:
        super().__init__(model)
        check_choice("mode", mode, get_args(Mode))
        check_choice("start", start, get_args(Start))
        if mode == "mode":
            check_loss(loss, "IMM with mode='mode'")
        self.mode, self.start, self.loss, self.embed = mode, start, loss, embed
        self.average: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin_split(self) -> None:
        """Puts the last split's own parameters back in the place of the average, unless `start` is that."""
        own = dict(self.model.named_parameters())
        for name, value in self.last.items():
            own[name].copy_(value)

    @torch.no_grad()
    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: its parameters join the average, which takes their place in the model.

        Args:
            batches: `(inputs, labels)` each for "mode"; not read for "mean".
        """
        own = trainable_parameters(self.model)
        weights = self._weights(own, batches)
        for name, parameter in own.items():
            weight, average = weights[name], self.average.get(name, parameter)
            total = weight + self._totals[name].to(weight.device) if name in self._totals else weight
            if self.start == "last":
                self.last[name] = parameter.detach().clone()
            self.average[name] = weighted_mean(average, parameter, weight=weight, total=total).clone()
            self._totals[name] = total
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        """`average`, `last` and the sums of the weights, `totals`, by parameter name."""
        return {"average": dict(self.average), "last": dict(self.last), "totals": dict(self._totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state.

        Raises:
            UserError: it is one of a model whose parameters have other names or shapes.
        """
        self._check_state(state)
        self.average, self.last = (
            copy_to_parameters(self.model, state["average"]),
            copy_to_parameters(self.model, state["last"]),
        )
        self._totals = {name: total.clone() for name, total in state["totals"].items()}

    def _weights(self, own: Mapping[str, Tensor], batches: Iterable[Any]) -> Mapping[str, Tensor]:
        if self.mode == "mean" or self.loss is None:
            return {name: torch.ones((), device=parameter.device) for name, parameter in own.items()}
        return estimate_fisher(self.model, batches, loss=self.loss, embed=self.embed)
