"""Synaptic Intelligence: importance is what a parameter's way through a split did for the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.methods.base import METHODS
from mas_embed.methods.elastic import Accumulation, Elastic
from mas_embed.methods.parameter_tensors import copy_to_parameters
from mas_embed.runtime.fingerprint import fingerprint_of


@METHODS.register("si")
class SI(Elastic):
    """Synaptic Intelligence (Zenke, Poole, Ganguli, ICML 2017): `Omega_p = relu(w_p) / (Delta_p^2 + xi)`.

    `w_p = sum over steps of -g_p dtheta_p` is the path integral of the gradient g of the unregularised loss over the
    parameter's movement, and Delta_p its whole movement in the split. The gradient is read in `add_penalty_grad`, before
    anything is added to it, and the movement in `after_step`; both must be called for every step of the optimizer, and
    `penalty()` in the loss does not do instead. No data is looked at when a split ends, and the steps of the path are those that
    were taken: with momentum or Adam a step follows earlier gradients too, and with weight decay and the pull more than
    gradients. The gradient is that of a mini-batch, whose noise makes w_p too large, as the authors say. What `batch_penalty`
    of another method adds to the loss is part of it.

    Args:
        model: the embedding model that is trained.
        strength: c of the paper, >= 0.
        xi: bounds the importance of a parameter that hardly moved, > 0.
        accumulation: of importance over the splits: "sum" (the paper's), "mean", "decay" or "max", see `Elastic`.
        decay: of the old importance under "decay".
        normalize: scale importance to a mean of 1.
        decoupled: pull after the optimizer's step instead of in the gradient.

    Attributes:
        path: w by parameter name, of the split that is being trained; float32 or wider.
        start: the parameters when it began, by name.

    Raises:
        UserError: from `consolidate`, if no step of the split was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        xi: float = 1e-3,
        accumulation: Accumulation = "sum",
        decay: float = 0.9,
        normalize: bool = False,
        decoupled: bool = False,
    ) -> None:
        super().__init__(
            model,
            strength=strength,
            accumulation=accumulation,
            decay=decay,
            normalize=normalize,
            decoupled=decoupled,
        )
        if not xi > 0:
            raise UserError(f"xi must be greater than 0, got {xi}")
        self.xi = xi
        self.path: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def add_penalty_grad(self) -> None:
        """Reads the gradient of the loss, then adds the penalty's, see `Elastic.add_penalty_grad`."""
        own = trainable_parameters(self.model)
        new = {name: parameter for name, parameter in own.items() if name not in self.start}
        self.start |= {name: parameter.detach().clone() for name, parameter in new.items()}
        self.path |= zero_sums(new)
        self._before = {
            name: (parameter.grad.to_dense().clone(), parameter.detach().clone())
            for name, parameter in own.items()
            if parameter.grad is not None
        }
        super().add_penalty_grad()

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the step to the path; a decoupled pull is part of it."""
        super().after_step(optimizer)
        own = dict(self.model.named_parameters())
        for name, (gradient, before) in self._before.items():
            self.path[name] -= gradient * (own[name] - before)
        self._before = {}

    @torch.no_grad()
    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The importance of the path that was gone; `batches` are not read. Its `num_samples` is 1: there is one path."""
        if not self.path:
            raise UserError(
                "SI has seen no step of this split; call add_penalty_grad() before and after_step(optimizer) after every step "
                "of the optimizer"
            )
        own = trainable_parameters(self.model)
        importance = {
            name: path.relu() / ((own[name] - self.start[name]).to(path.dtype).square() + self.xi)
            for name, path in self.path.items()
            if name in own
        }
        return Importance(importance, 1, {"output": "path integral", "xi": self.xi}, fingerprint_of(self.model))

    def consolidate(self, batches: Iterable[Any]) -> Importance:
        """Ends a split: importance from its path, see `Elastic.consolidate`; a new path begins."""
        importance = super().consolidate(batches)
        self.path, self.start, self._before = {}, {}, {}
        return importance

    def state_dict(self) -> dict[str, Any]:
        """That of `Elastic`, with `path` and `start`."""
        return super().state_dict() | {"path": dict(self.path), "start": dict(self.start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, see `Elastic.load_state_dict`."""
        super().load_state_dict(state)
        self.path, self.start = (
            copy_to_parameters(self.model, state["path"]),
            copy_to_parameters(self.model, state["start"]),
        )
