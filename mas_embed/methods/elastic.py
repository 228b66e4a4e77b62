"""The quadratic penalty `strength * sum_p importance_p (theta_p - anchor_p)^2` that MAS and its relatives share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.methods.base import Method

Accumulation = Literal["sum", "mean", "max"]


class Elastic(Method, ABC):
    """Pulls every parameter back to its anchor, by how important it was to the splits so far.

    A subclass says where importance comes from, in `estimate`. Parameters are told apart by name. Those that are
    frozen, and those that were added to the model after the last `consolidate` (a grown head), are free.

    Args:
        model: the embedding model that is trained.
        strength: factor of the penalty, >= 0, finite; 0 is finetune.
        accumulation: how the importance of a new split joins that of the splits before: "sum" (the paper's), "mean"
            over the splits, or "max" of the two.

    Attributes:
        importance: accumulated importance by parameter name, values >= 0; empty before the first `consolidate`.
        anchor: the parameters after the last split, by name.
        num_splits: how many splits were consolidated.
    """

    def __init__(self, model: nn.Module, *, strength: float = 1.0, accumulation: Accumulation = "sum") -> None:
        super().__init__(model)
        if not (math.isfinite(strength) and strength >= 0):
            raise UserError(f"strength must be a finite number >= 0, got {strength}")
        if accumulation not in ("sum", "mean", "max"):
            raise UserError(f"accumulation must be 'sum', 'mean' or 'max', got '{accumulation}'")
        self.strength, self.accumulation = strength, accumulation
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.num_splits = 0

    @abstractmethod
    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The importance of the parameters to the split that ends, from its batches."""

    def penalty(self) -> Tensor:
        """`strength * sum_p importance_p (theta_p - anchor_p)^2`, no factor 1/2; exactly 0 before the first `consolidate`."""
        total = super().penalty()
        for parameter, anchor, importance in self._protected():
            total = total + (importance * (parameter - anchor).square()).sum()
        return self.strength * total

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Adds `2 * strength * importance * (theta - anchor)` to `.grad`, in a few passes over all parameters at once."""
        protected = self._protected()
        if not protected or self.strength == 0:
            return
        parameters, anchors, importances = map(list, zip(*protected, strict=True))
        pulls = torch._foreach_sub(parameters, anchors)
        torch._foreach_mul_(pulls, importances)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()  # the pull is dense
        torch._foreach_add_([parameter.grad for parameter in parameters], pulls, alpha=2 * self.strength)

    def consolidate(self, batches: Iterable[Any]) -> Importance:
        """Ends a split: estimates its importance, accumulates it, and makes the parameters as they are now the anchor.

        A parameter that was frozen in the split keeps the importance and the anchor that it had.

        Args:
            batches: unlabeled inputs of the split, or of whatever the model will be applied to; labels are ignored.

        Returns:
            The importance of this split alone.
        """
        estimated = self.estimate(batches)
        self.num_splits += 1
        own = self._parameters()
        self.importance |= {name: self._accumulated(name, new) for name, new in estimated.items()}
        self.anchor |= {name: own[name].detach().clone() for name in estimated}
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
        missing = {"importance", "anchor", "num_splits"} - state.keys()
        if missing:
            raise UserError(f"the state lacks {', '.join(sorted(missing))}; it is not one of {type(self).__name__}")
        own = self._parameters()
        for name, anchor in state["anchor"].items():
            if name not in own:
                raise UserError(
                    f"the state protects a parameter '{name}' that the model does not have; load it into the model it is of"
                )
            if own[name].shape != anchor.shape:
                raise UserError(
                    f"parameter '{name}' has shape {list(own[name].shape)} but {list(anchor.shape)} in the state"
                )
        self.importance = {name: tensor.to(own[name].device, copy=True) for name, tensor in state["importance"].items()}
        self.anchor = {name: tensor.to(own[name].device, copy=True) for name, tensor in state["anchor"].items()}
        self.num_splits = int(state["num_splits"])

    def _accumulated(self, name: str, new: Tensor) -> Tensor:
        """The importance of all splits so far; one that first appears now had none before."""
        old = self.importance.get(name, torch.zeros_like(new))
        if self.accumulation == "sum":
            return old + new
        if self.accumulation == "mean":
            return old + (new - old) / self.num_splits
        return torch.maximum(old, new)

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
