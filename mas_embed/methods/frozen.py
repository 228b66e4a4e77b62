"""Training on the first split only, the reference without forgetting and without learning anything new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError, unknown_name
from mas_embed.methods.base import METHODS, Method


@METHODS.register("frozen")
class Frozen(Method):
    """Trains on the first split and never changes the model, or a module of it, again.

    With `only`, the later splits are trained as well, but the parameters and buffers of the module, such as the running
    statistics of batch normalisation, are reset to their values at the end of the first split after every step.

    A model that is good before the first split is frozen from the start by a `consolidate` before training.

    Args:
        model: the embedding model that is trained.
        only: the name of the submodule that is frozen, as in `model.get_submodule(only)`; None for the whole model.

    Raises:
        UserError: the model has no such submodule.
    """

    def __init__(self, model: nn.Module, *, only: str | None = None) -> None:
        super().__init__(model)
        names = [name for name, _ in model.named_modules() if name]
        if only is not None and only not in names:
            raise unknown_name("module of the model", only, names)
        self.only = only
        self.num_splits = 0
        self.held: dict[str, Tensor] = {}

    @property
    def is_learning(self) -> bool:
        return self.only is not None or self.num_splits == 0

    @property
    def acts_after_step(self) -> bool:
        """Whether a module alone is frozen, which is reset after every step."""
        return self.only is not None

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Resets the frozen module, from the second split on."""
        values = self._values() if self.held else {}
        for name, held in self.held.items():
            values[name].copy_(held)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split; the first one gives the values of the frozen module. `batches` is not read."""
        if self.num_splits == 0:
            self.held = {name: value.detach().clone() for name, value in self._values().items()}
        self.num_splits += 1

    def _values(self) -> dict[str, Tensor]:
        """The parameters and buffers of the module that alone is frozen; none if it is the whole model."""
        return {} if self.only is None else self.model.get_submodule(self.only).state_dict(keep_vars=True)

    def _state(self) -> dict[str, Any]:
        return {"num_splits": self.num_splits, **({} if self.only is None else {"held": dict(self.held)})}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: the state belongs to a model whose module has other parameters or buffers.
        """
        values, held = self._values(), {} if self.only is None else state["held"]
        for name, value in held.items():
            if name not in values or values[name].shape != value.shape:
                raise UserError(
                    f"the state holds '{name}' of shape {list(value.shape)}, which '{self.only}' does not have"
                )
        self.held = {name: value.to(values[name].device, copy=True) for name, value in held.items()}
        self.num_splits = int(state["num_splits"])
