"""The training of one split between two steps: everything that goes on changing, as a state that can be stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.seeding import random_state, set_random_state
from mas_embed.runtime.stored_objects import restore, state_of
from mas_embed.training.order import ResumableOrder

if TYPE_CHECKING:
    from mas_embed.training.step import Learner

_BLOCK = 1024  # losses that are joined to one tensor


class Losses:
    """The losses of the batches of an epoch, which stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._joined: list[Tensor] = []
        self._last: list[Tensor] = []

    def append(self, loss: Tensor) -> None:
        """Adds the loss of a batch, a detached scalar."""
        self._last.append(loss)
        if len(self._last) == _BLOCK:
            self._joined, self._last = [self.values()], []

    def values(self) -> Tensor:
        """All losses [number of batches]; there must be one."""
        return torch.cat([*self._joined, *([torch.stack(self._last)] if self._last else [])])

    def __len__(self) -> int:
        return sum(map(len, self._joined)) + len(self._last)

    @classmethod
    def of_values(cls, values: Tensor) -> Losses:
        """The losses with these values."""
        losses = cls()
        losses._joined = [values] if len(values) else []
        return losses


@dataclass
class SplitTraining:
    """The training of one split, between two of its batches.

    Attributes:
        learner: with the split's copies of the loss and the miner.
        order: of the items, which the batches are made of.
        batches: of one epoch after another.
        optimizer: of the split.
        scheduler: of its learning rate, or None.
        epoch: from 0; the number of epochs once the last has ended.
        num_steps: batches so far.
        losses: of the batches of this epoch so far.
    """

    learner: Learner
    order: ResumableOrder
    batches: Any
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler | None
    epoch: int = 0
    num_steps: int = 0
    losses: Losses = field(default_factory=Losses)
    _random_state: Mapping[str, Tensor] | None = None  # to be set once the first batch has been drawn

    def remaining_batches(self) -> Iterator[Any]:
        """The batches of this epoch that were not learned yet."""
        self.batches.set_epoch(self.epoch)
        batches = iter(self.batches)
        first = next(batches, None)
        self.set_random_state()
        if first is not None:
            yield first
            yield from batches

    def set_random_state(self) -> None:
        """Sets the generators as they were when the state was stored that was loaded, once; else does nothing."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def end_epoch(self) -> None:
        """Goes on to the next epoch."""
        self.epoch, self.losses = self.epoch + 1, Losses()

    @property
    def can_be_left(self) -> bool:
        """Whether this is a place to go on from: not amid accumulated batches, nor between the last batch and the epoch's end."""
        accelerator = self.learner.accelerator
        return bool(accelerator.sync_gradients and not accelerator.gradient_state.end_of_dataloader)

    def first_bad_step(self) -> tuple[int, float] | None:
        """The first batch of this epoch whose loss is not finite, counted in the split from 1, and this loss; None for none."""
        losses = self.losses.values()
        if math.isfinite(float(losses.sum())) or bool(losses.isfinite().all()):
            return None
        index = int((~losses.isfinite()).nonzero()[0])
        return self.num_steps - len(losses) + index + 1, float(losses[index])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all trained parameters are finite. O(parameters), waits for the device once."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return not parameters or math.isfinite(float(_sum_of_norms(parameters)))

    def check_storable(self) -> None:
        """Raises `UserError` for a loss, a miner, an optimizer or a scheduler whose state cannot be stored."""
        self._states()

    def state_dict(self) -> dict[str, Any]:
        """Everything beside model, method and evaluator from which training goes on as if it had not been interrupted."""
        return {
            "epoch": self.epoch,
            "num_steps": self.num_steps,
            "losses": self.losses.values() if len(self.losses) else torch.empty(0),
            "order": self.order.state_dict(),
            "random_state": random_state(),
            **self._states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the model and the method are in theirs already.

        Raises:
            UserError: it is of another loss, miner, optimizer or scheduler, or damaged.
        """
        learner, device = self.learner, self.learner.accelerator.device
        have_states = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": learner.accelerator.scaler}
        for name, component in self._components().items():
            with _named(name):
                restored = restore(component, state[name], device)
                if have_states.get(name) is not None:
                    have_states[name].load_state_dict(restored)
        self.epoch, self.num_steps = int(state["epoch"]), int(state["num_steps"])
        self.losses = Losses.of_values(state["losses"].to(device))
        num_items = len(self.losses) * learner.recipe.batch_size
        self.order.load_state_dict(state["order"], num_skipped=num_items if num_items else None)
        self._random_state = state["random_state"]
        if not num_items:
            self.set_random_state()

    def _states(self) -> dict[str, Any]:
        states = {}
        for name, component in self._components().items():
            with _named(name):
                states[name] = state_of(component)
        return states

    def _components(self) -> dict[str, Any]:
        """The loss and the miner, and the states of what has a state by itself."""
        scaler = self.learner.accelerator.scaler
        return {
            "loss": self.learner.loss,
            "miner": self.learner.miner,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }


@contextmanager
def _named(component: str) -> Iterator[None]:
    """Names the component in what its state cannot be stored or loaded for."""
    try:
        yield
    except (UserError, ValueError, KeyError) as error:
        raise UserError(f"the {component}: {reason_of(error)}") from error


def _sum_of_norms(parameters: list[nn.Parameter]) -> Tensor:
    """A number that is finite if all parameters are."""
    norms = torch._foreach_norm([parameter.detach() for parameter in parameters], torch.inf)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).sum()
