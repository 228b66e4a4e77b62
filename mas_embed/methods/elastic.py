"""The quadratic penalty `strength * sum_p importance_p (theta_p - anchor_p)^2`, shared by MAS, local MAS, EWC and SI."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.importance.parameters import trainable_parameters
from mas_embed.methods.base import AnchoredParameter, Method
from mas_embed.methods.checks import check_strength
from mas_embed.methods.parameter_blocks import in_blocks
from mas_embed.methods.parameter_tensors import copy_to_parameters
from mas_embed.methods.parameter_watch import ParameterWatch
from mas_embed.runtime.checks import check_choice, check_range
from mas_embed.runtime.sharding import whole

Accumulation = Literal["sum", "mean", "decay", "max"]


class Elastic(Method, ABC):
    """Pulls every parameter towards its anchor in proportion to its importance to the earlier splits.

    A subclass defines the importance in `estimate`. Parameters are identified by name. Frozen parameters, and parameters that
    were added to the model after the last `consolidate` (a new head, for example), are not pulled. A warning says so once if
    protected parameters vanish from the model or are replaced by others of the same name, or if all of them are frozen while
    other parameters are trained, as can happen with adapters.

    After `torch.distributed.fsdp.fully_shard`, importance and anchor are sharded as the parameters are. Importance cannot be
    estimated then: consolidate before the model is sharded, and load the state into a method of the sharded model.

    Args:
        model: the embedding model that is trained.
        strength: factor of the penalty, finite and >= 0; 0 is plain finetuning.
        accumulation: how the importance of a new split is combined with the accumulated importance of the earlier splits:
            "sum" (as in the paper of MAS), "mean" over the splits, "decay" (`decay * old + new`), or "max" of the two.
        decay: factor of the old importance under "decay", from 0 (only the last split counts) to 1 (the same as "sum").
        normalize: whether the penalty is divided by the mean of the accumulated importance over all values of all parameters,
            so that one strength suits any model, output and number of splits.
        decoupled: whether the parameters are pulled after the optimizer's step instead of through the gradient, see
            `after_step`.

    Attributes:
        importance: the accumulated importance by parameter name, values >= 0, before `normalize`; empty before the first
            `consolidate`.
        anchor: the parameters at the end of the last split, by name.
        num_splits: the number of splits that were consolidated.
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
        self._watch = ParameterWatch()

    @abstractmethod
    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The importance of every parameter to the split that has just been learned, estimated from its batches."""

    def penalty(self) -> Tensor:
        """The penalty `strength * sum_p importance_p (theta_p - anchor_p)^2`, without a factor 1/2.

        It is exactly 0 before the first `consolidate`. Add it to the loss instead of calling `add_penalty_grad`. With
        `decoupled` it must not be added to the loss, because the parameters are pulled after the optimizer's step.
        """
        total = super().penalty()
        for parameter, anchor, importance in self._protected():
            total = total + whole((importance * (parameter - anchor).square()).sum())
        return self.strength * self._scale * total

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Adds `2 * strength * importance * (theta - anchor)` to `.grad` in one pass; adds nothing if `decoupled`."""
        protected = self._protected()
        if self.strength == 0 or self.decoupled or not protected:
            return
        for parameter, _, _ in protected:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()  # the gradient of the penalty is dense
        rows = [(parameter.grad, parameter, anchor, importance) for parameter, anchor, importance in protected]
        for gradients, parameters, anchors, importances in in_blocks(rows):
            distances = torch._foreach_sub(parameters, anchors)
            torch._foreach_addcmul_(gradients, distances, importances, value=2 * self.strength * self._scale)

    @property
    def acts_after_step(self) -> bool:
        """Whether the pull of the penalty follows the steps of the optimizer."""
        return self.decoupled

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """If `decoupled`, moves every parameter to `(theta + c anchor) / (1 + c)`, with `c = 2 lr strength importance`.

        This is a proximal step: the new theta' minimizes the penalty plus `(theta' - theta)^2 / (2 lr)`, where theta is the
        result of the optimizer's step. It is stable at any strength and, like decoupled weight decay (Loshchilov and Hutter,
        2019), is not rescaled by an adaptive optimizer. The learning rate is that of the parameter's group. Parameters that
        the optimizer does not hold are not moved.
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
        """Ends a split: accumulates the importance of its parameters and stores their current values as the anchor.

        The importance and the anchor of a parameter that was frozen during the split do not change. Those of a parameter that
        the model no longer has are dropped.

        Args:
            batches: batches of the split, or of other data that the model will be applied to; see `estimate` for their form.

        Returns:
            The importance of this split alone.
        """
        self._protected()  # warns if parameters have changed since the last step
        estimated = self.estimate(batches)
        self.num_splits += 1
        parameters = dict(self.model.named_parameters())
        self.anchor = {name: value for name, value in self.anchor.items() if name in parameters}
        self.importance = {name: value for name, value in self.importance.items() if name in parameters}
        totals = {name: self._accumulated_importance(name, new) for name, new in estimated.items()}
        self.anchor |= {
            name: self._new_anchor(name, parameters[name].detach(), estimated[name], total)
            for name, total in totals.items()
        }
        self.importance |= totals
        self._update_scale()
        self._watch.start(self.model, self.anchor)
        return estimated

    def anchored_parameters(self) -> dict[str, AnchoredParameter]:
        """The accumulated importance and the anchor of every parameter, by name; the importance is not normalized."""
        return {name: AnchoredParameter(self.importance[name], anchor) for name, anchor in self.anchor.items()}

    def _state(self) -> dict[str, Any]:
        """The attributes `importance`, `anchor` and `num_splits`."""
        importance, anchor = (
            {name: whole(value) for name, value in values.items()} for values in (self.importance, self.anchor)
        )
        return {"importance": importance, "anchor": anchor, "num_splits": self.num_splits}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: the model does not have one of the state's parameters, or has it with another shape. Parameters of the
                model that the state lacks are not an error; they are not pulled.
        """
        importance = copy_to_parameters(self.model, state["importance"])
        anchor = copy_to_parameters(self.model, state["anchor"])
        is_own = bool(self.anchor) and all(state["anchor"].get(name) is value for name, value in self.anchor.items())
        self.importance, self.anchor, self.num_splits = importance, anchor, int(state["num_splits"])
        self._update_scale()
        if not is_own:  # its own state, loaded to move it to another device, holds no values of other parameters
            self._watch = ParameterWatch()
            self._watch.start(self.model, self.anchor)

    def _accumulated_importance(self, name: str, new: Tensor) -> Tensor:
        """The importance of a parameter to all splits so far; that of a new parameter to earlier splits was zero."""
        old = self.importance[name].to(new.device) if name in self.importance else torch.zeros_like(new)
        if self.accumulation == "sum":
            return old + new
        if self.accumulation == "mean":
            return old + (new - old) / self.num_splits
        if self.accumulation == "decay":
            return self.decay * old + new
        return torch.maximum(old, new)

    def _new_anchor(self, name: str, parameter: Tensor, new: Tensor, total: Tensor) -> Tensor:
        """The next anchor of a parameter, given its value and its importance to the new split and to all splits."""
        return parameter.clone()

    def _update_scale(self) -> None:
        """Sets the factor by which `normalize` scales the penalty."""
        if self.normalize and self.importance:
            total = sum(float(whole(value.sum(dtype=torch.float64))) for value in self.importance.values())
            num_values = sum(value.numel() for value in self.importance.values())
            self._scale = num_values / total if total > 0 else 1.0

    def _protected(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Parameter, anchor and importance of every trainable parameter that has an anchor, on the parameter's device."""
        parameters = trainable_parameters(self.model)
        if self.strength:
            self._watch.check(type(self).__name__, self.model, self.anchor, parameters)
        names = [name for name in self.anchor if name in parameters]
        for name in names:
            parameter, anchor = parameters[name], self.anchor[name]
            if parameter.shape != anchor.shape:
                raise UserError(
                    f"parameter '{name}' has shape {list(parameter.shape)}, but had {list(anchor.shape)} when the last split "
                    "ended; give a layer that has grown a new name"
                )
            if anchor.device != parameter.device:
                self.anchor[name] = anchor.to(parameter.device)
                self.importance[name] = self.importance[name].to(parameter.device)
        return [(parameters[name], self.anchor[name], self.importance[name]) for name in names]
