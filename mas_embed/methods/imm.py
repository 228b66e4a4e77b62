"""Incremental Moment Matching, which averages the models of all splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.importance.parameters import trainable_parameters
from mas_embed.methods.base import METHODS, Loss, Method
from mas_embed.methods.fisher import check_loss, estimate_fisher
from mas_embed.methods.parameter_tensors import copy_to_parameters, weighted_mean, write_to_parameters
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.forward import Embed, check_embed

Mode = Literal["mean", "mode"]
Start = Literal["last", "average"]


@METHODS.register("imm")
class IMM(Method):
    """Incremental Moment Matching (Lee et al., NeurIPS 2017), which averages parameters over the models of all splits.

    The mode "mean" is the plain mean, `1/K sum_k theta_k`. The mode "mode" weights every parameter by the Fisher information
    of the training loss on its split, `sum_k F_k theta_k / sum_k F_k` (see `estimate_fisher`); a parameter whose weights are
    all 0 takes its value from the last split. `consolidate` writes the average into the model, so the averaged model is
    evaluated and used between splits.

    With `start="last"`, `begin_split` restores the parameters at the end of the last split, and the next split is trained from
    there, as in the paper's weight transfer. With `start="average"`, the next split is trained from the average, which
    deviates from the paper. All splits have the same weight. The paper's L2 transfer and drop transfer are not implemented.
    Buffers, such as running statistics, are not averaged. A parameter that is frozen during a split does not enter the
    average of that split.

    Args:
        model: the embedding model that is trained.
        mode: "mean" or "mode".
        start: the parameters from which the next split is trained, "last" or "average".
        loss: the loss whose Fisher information is taken in the mode "mode", `(embeddings, labels, mined) -> Tensor []`. In a
            config it is the training loss, unless the method names another one, see `EWC`.
        embed: replaces `model(input)` in the mode "mode", see `EWC`.

    Raises:
        UserError: in the mode "mode" the loss is missing or has trainable parameters; or, from `consolidate`, batches have no
            labels.
    """

    consolidates_shares = True

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
        check_embed(model, embed)
        self.mode, self.start, self.loss, self.embed = mode, start, loss, embed
        self.average: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}

    def begin_split(self) -> None:
        """With `start="last"`, replaces the average in the model by the parameters at the end of the last split."""
        write_to_parameters(self.model, self.last)

    @torch.no_grad()
    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: includes its parameters in the average and writes the average into the model.

        Args:
            batches: pairs `(inputs, labels)` in the mode "mode"; not read in the mode "mean".
        """
        parameters = trainable_parameters(self.model)
        weights = self._weights(parameters, batches)
        for name, parameter in parameters.items():
            weight, average = weights[name], self.average.get(name, parameter)
            total = weight + self._totals[name].to(weight.device) if name in self._totals else weight
            if self.start == "last":
                self.last[name] = parameter.detach().clone()
            self.average[name] = weighted_mean(average, parameter, weight=weight, total=total).clone()
            self._totals[name] = total
            parameter.copy_(self.average[name])

    def _state(self) -> dict[str, Any]:
        """The attributes `average` and `last`, and the sums of the weights, `totals`, by parameter name."""
        return {"average": dict(self.average), "last": dict(self.last), "totals": dict(self._totals)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: the state belongs to a model whose parameters have other names or shapes.
        """
        self.average = copy_to_parameters(self.model, state["average"])
        self.last = copy_to_parameters(self.model, state["last"])
        self._totals = {name: total.clone() for name, total in state["totals"].items()}

    def _weights(self, parameters: Mapping[str, Tensor], batches: Iterable[Any]) -> Mapping[str, Tensor]:
        """The weights of the parameters of the split that ends, by parameter name."""
        if self.mode == "mean" or self.loss is None:
            return {name: torch.ones((), device=parameter.device) for name, parameter in parameters.items()}
        return estimate_fisher(self.model, batches, loss=self.loss, embed=self.embed)
