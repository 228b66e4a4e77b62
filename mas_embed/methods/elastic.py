"""The quadratic penalty `strength * sum_p importance_p (theta_p - anchor_p)^2` that MAS and its relatives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.methods.base import Method
from mas_embed.methods.checks import check_choice, check_range, check_strength
from mas_embed.methods.parameter_blocks import in_blocks
from mas_embed.methods.parameter_tensors import copy_to_parameters

Accumulation = Literal["sum", "mean", "decay", "max"]


class Elastic(Method, ABC):
    """Pulls every parameter back to its anchor, by how important it was to the splits so far.

    A subclass says where importance comes from, in `estimate`. Parameters are told apart by name. Those that are
    frozen, and those that were added to the model after the last `consolidate` (a grown head), are free.

    Args:
        model: the embedding model that is trained.
        strength: factor of the penalty, >= 0, finite; 0 is finetune.
        accumulation: how the importance of a new split joins that of the splits before: "sum" (the paper's), "mean"
            over the splits, "decay" (`decay * old + new`), or "max" of the two.
        decay: of the old importance under "decay", from 0 (the last split only) to 1 (as "sum").
        normalize: scale the penalty by `1 / mean(importance)`, the mean over all values of all parameters of the accumulated
            importance, so that one strength fits models, outputs and numbers of splits of any scale.
        decoupled: instead of adding to the gradient, move the parameters after the optimizer's step, see `after_step`.

    Attributes:
        importance: accumulated importance by parameter name, values >= 0, before `normalize`; empty before the first
            `consolidate`.
        anchor: the parameters after the last split, by name.
        num_splits: how many splits were consolidated.
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
    ) -> None:
        super().__init__(model)
        check_strength(strength)
        check_choice("accumulation", accumulation, get_args(Accumulation))
        check_range("decay", decay, 0, 1)
        self.strength, self.accumulation, self.decay = strength, accumulation, decay
        self.normalize, self.decoupled = normalize, decoupled
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.num_splits = 0
        self._scale = 1.0

    @abstractmethod
    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The importance of the parameters to the split that ends, from its batches."""

    def penalty(self) -> Tensor:
        """`strength * sum_p importance_p (theta_p - anchor_p)^2`, no factor 1/2; exactly 0 before the first `consolidate`.

        For the loss, instead of `add_penalty_grad`; with `decoupled` only to look at, as the pull is made after the step.
        """
        total = super().penalty()
        for parameter, anchor, importance in self._protected():
            total = total + (importance * (parameter - anchor).square()).sum()
        return self.strength * self._scale * total

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Adds `2 * strength * importance * (theta - anchor)` to `.grad`, in one pass; nothing if `decoupled`."""
        protected = self._protected()
        if self.strength == 0 or self.decoupled or not protected:
            return
        for parameter, _, _ in protected:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()  # the pull is dense
        rows = [(parameter.grad, parameter, anchor, importance) for parameter, anchor, importance in protected]
        for gradients, parameters, anchors, importances in in_blocks(rows):
            distances = torch._foreach_sub(parameters, anchors)
            torch._foreach_addcmul_(gradients, distances, importances, value=2 * self.strength * self._scale)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """If `decoupled`, moves every parameter to `(theta + c anchor) / (1 + c)`, `c = 2 lr strength importance`.

        That is the exact minimum of the penalty plus the distance to where the step led, `(theta' - theta)^2 / (2 lr)` (a
        proximal step): stable at any strength, and not rescaled by an adaptive optimizer, as decoupled weight decay is not
        (Loshchilov and Hutter, 2019). The learning rate is that of the parameter's group; a parameter that the optimizer
        does not hold stays where it is.
        """
        if self.strength == 0 or not self.decoupled:
            return
        protected = {id(row[0]): row for row in self._protected()}
        for group in optimizer.param_groups:
            factor = 2 * float(group["lr"]) * self.strength * self._scale
            rows = [protected[id(parameter)] for parameter in group["params"] if id(parameter) in protected]
            for parameters, anchors, importances in in_blocks(rows):
                # (theta + c a) / (1 + c) = theta + (a - theta) c / (1 + c)
                pulls = torch._foreach_mul(importances, factor)
                torch._foreach_div_(pulls, torch._foreach_add(pulls, 1))
                torch._foreach_add_(parameters, torch._foreach_mul(pulls, torch._foreach_sub(anchors, parameters)))

    def consolidate(self, batches: Iterable[Any]) -> Importance:
        """Ends a split: estimates its importance, accumulates it, and makes the parameters as they are now the anchor.

        A parameter that was frozen in the split keeps the importance and the anchor that it had.

        Args:
            batches: of the split, or of whatever the model will be applied to; see `estimate` for what must be in them.

        Returns:
            The importance of this split alone.
        """
        estimated = self.estimate(batches)
        self.num_splits += 1
        own = self._parameters()
        totals = {name: self._accumulated(name, new) for name, new in estimated.items()}
        self.anchor |= {
            name: self._anchored(name, own[name].detach(), estimated[name], total) for name, total in totals.items()
        }
        self.importance |= totals
        self._rescale()
        return estimated

    def state_dict(self) -> dict[str, Any]:
        """`importance` and `anchor` by parameter name, and `num_splits`."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor), "num_splits": self.num_splits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state; refuses one of a model whose parameters have other names or shapes.

        Raises:
            UserError: names the parameters that differ. Parameters of the model that the state lacks are not an error:
                they are free.
        """
        self._check_state(state)
        self.importance, self.anchor = (
            copy_to_parameters(self.model, state["importance"]),
            copy_to_parameters(self.model, state["anchor"]),
        )
        self.num_splits = int(state["num_splits"])
        self._rescale()

    def _accumulated(self, name: str, new: Tensor) -> Tensor:
        """The importance of all splits so far; one that first appears now had none before."""
        old = self.importance[name].to(new.device) if name in self.importance else torch.zeros_like(new)
        if self.accumulation == "sum":
            return old + new
        if self.accumulation == "mean":
            return old + (new - old) / self.num_splits
        if self.accumulation == "decay":
            return self.decay * old + new
        return torch.maximum(old, new)

    def _anchored(self, name: str, parameter: Tensor, new: Tensor, total: Tensor) -> Tensor:
        """Where a parameter is pulled to from now on, from the importance of the new split and that of all."""
        return parameter.clone()

    def _rescale(self) -> None:
        if self.normalize and self.importance:
            total = sum(float(value.sum(dtype=torch.float64)) for value in self.importance.values())
            num_values = sum(value.numel() for value in self.importance.values())
            self._scale = num_values / total if total > 0 else 1.0

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def _protected(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Parameter, anchor and importance of everything that is protected and trainable."""
        own = {name: parameter for name, parameter in self._parameters().items() if parameter.requires_grad}
        for name in [name for name in self.anchor if name in own]:
            if own[name].shape != self.anchor[name].shape:
                shapes = f"{list(own[name].shape)}, but {list(self.anchor[name].shape)}"
                raise UserError(
                    f"parameter '{name}' has shape {shapes} when the last split ended; give a grown layer a new name"
                )
            if self.anchor[name].device != own[name].device:
                self.anchor[name] = self.anchor[name].to(own[name].device)
                self.importance[name] = self.importance[name].to(own[name].device)
        return [(own[name], anchor, self.importance[name]) for name, anchor in self.anchor.items() if name in own]
