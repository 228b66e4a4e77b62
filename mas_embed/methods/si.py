"""Synaptic Intelligence, in which importance is the contribution of a parameter's changes to the decrease of the loss."""

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
from mas_embed.runtime.sharding import own_shard, whole


@METHODS.register("si")
class SI(Elastic):
    """Synaptic Intelligence (Zenke, Poole, Ganguli, ICML 2017): `Omega_p = relu(w_p) / (Delta_p^2 + xi)`.

    `w_p = sum over steps of -g_p dtheta_p` is the path integral of the gradient g of the loss without the penalty along the
    trajectory of the parameter, and Delta_p is the total change of the parameter in the split.

    `add_penalty_grad` reads the gradient before the penalty is added to it, and `after_step` reads the change of the
    parameter. Both must be called for every step of the optimizer; adding `penalty()` to the loss is not enough. The data is
    not read again when a split ends.

    The changes are those that the optimizer made, so they also depend on earlier gradients (momentum, Adam), on weight decay
    and on the penalty. The gradient is that of a mini-batch, whose noise makes w_p too large, as the authors note. It includes
    the gradient of the `batch_penalty` of another method.

    Args:
        model: the embedding model that is trained.
        strength: c of the paper, >= 0.
        xi: bounds the importance of a parameter that hardly changed, > 0.
        accumulation: how importance is accumulated over the splits: "sum" (as in the paper), "mean", "decay" or "max", see
            `Elastic`.
        decay: factor of the old importance under "decay", from 0 to 1.
        normalize: whether importance is scaled to a mean of 1, see `Elastic`.
        decoupled: whether the parameters are pulled after the optimizer's step instead of through the gradient.

    Attributes:
        path: w of the current split by parameter name; float32 or wider.
        start: the parameters at the start of the current split, by name.

    Raises:
        UserError: `xi` is not greater than 0; from `add_penalty_grad`, `after_step` was not called after the last step; or,
            from `consolidate`, no step of the split was recorded.
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
        """Records the gradient of the loss, then adds the gradient of the penalty, see `Elastic.add_penalty_grad`."""
        parameters = trainable_parameters(self.model)
        self._check_last_step(parameters)
        new = {name: parameter for name, parameter in parameters.items() if name not in self.start}
        self.start |= {name: parameter.detach().clone() for name, parameter in new.items()}
        self.path |= zero_sums(new)
        self._before = {
            name: (
                (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).clone(),
                parameter.detach().clone(),
            )
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        super().add_penalty_grad()

    def _check_last_step(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises `UserError` if the last step was not recorded, without which nothing would be protected.

        A step that a gradient scaler skipped is not recorded either, but it does not change the parameters.
        """
        last = ((parameters[name], before) for name, (_, before) in self._before.items() if name in parameters)
        if any(not torch.equal(own_shard(now), own_shard(before).to(now.device)) for now, before in last):
            raise UserError(
                "SI has not recorded the last step, which has changed the parameters; call after_step(optimizer) after every "
                "step of the optimizer"
            )

    @property
    def acts_after_step(self) -> bool:
        """True: every step is recorded."""
        return True

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the last step to the path integral; the decoupled pull counts as part of the step."""
        super().after_step(optimizer)
        parameters = dict(self.model.named_parameters())
        for name, (gradient, before) in self._before.items():
            self.path[name] -= gradient * (parameters[name] - before)
        self._before = {}

    @torch.no_grad()
    def estimate(self, batches: Iterable[Any]) -> Importance:
        """The importance from the path integral; `batches` is not read. Its `num_samples` is 1, because there is one path."""
        if not self.path:
            raise UserError(
                "SI has recorded no step of this split; call add_penalty_grad() before and after_step(optimizer) after every "
                "step of the optimizer"
            )
        parameters = trainable_parameters(self.model)
        importance = {
            name: path.relu() / ((parameters[name] - self.start[name]).to(path.dtype).square() + self.xi)
            for name, path in self.path.items()
            if name in parameters
        }
        return Importance(importance, 1, {"output": "path integral", "xi": self.xi}, fingerprint_of(self.model))

    def consolidate(self, batches: Iterable[Any]) -> Importance:
        """Ends a split, see `Elastic.consolidate`, and starts a new path for the next split."""
        importance = super().consolidate(batches)
        self.path, self.start, self._before = {}, {}, {}
        return importance

    def _state(self) -> dict[str, Any]:
        """The state of `Elastic`, and the attributes `path` and `start`."""
        path, start = ({name: whole(value) for name, value in values.items()} for values in (self.path, self.start))
        return super()._state() | {"path": path, "start": start}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state, see `Elastic._load_state`."""
        super()._load_state(state)
        self.path = copy_to_parameters(self.model, state["path"])
        self.start = copy_to_parameters(self.model, state["start"])
        self._before = {}
