"""How a split is trained: everything beside data, model, method and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_number, as_whole_number, check_choice

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Precision = Literal["no", "bf16", "fp16"]
MakeSampler = Callable[[Tensor], Sampler[int] | list[int]]


@dataclass(frozen=True)
class Recipe:
    """How every split is trained.

    Attributes:
        epochs: passes over each split.
        batch_size: of training; that of all processes together.
        optimizer: `parameters -> Optimizer`, such as `functools.partial(torch.optim.Adam, lr=1e-3)`; called for every split.
            A model with a method `parameter_groups(lr)` says how fast each of its parts learns.
        scheduler: `optimizer -> LRScheduler`, which steps after every epoch; None for a constant learning rate.
        sampler: `labels [N] -> Sampler` of one epoch, such as `functools.partial(per_class_sampler, m=4)`; None for every item
            once, shuffled.
        num_workers: processes that load training batches, and those that a method consolidates on; 0 to load them in this
            one. The batches are the same for any number.
        clip_norm: the largest norm of the gradient, penalty included, over all parameters; None for no limit.
        accumulate: batches whose gradients are averaged for one step of the optimizer. If an accelerator is passed to
            `train_sequence`, its number is used, and this one must be 1.
        precision: of the forward passes in training: "bf16" or "fp16" for half precision where torch has it, "no" for that of
            the model; None for what `accelerate launch --mixed_precision` says. With an accelerator, its precision is used, and
            this one must be None.
        compile: whether the model is compiled for training by `torch.compile`.

    Raises:
        UserError: a number is out of its range, or the optimizer, the scheduler or the sampler cannot be called.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: MakeOptimizer = torch.optim.Adam
    scheduler: MakeScheduler | None = None
    sampler: MakeSampler | None = None
    num_workers: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Precision | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("num_workers", 0), ("accumulate", 1)):
            object.__setattr__(self, name, as_whole_number(name, getattr(self, name), least))
        if self.precision is not None:
            check_choice("precision", self.precision, get_args(Precision))
        if not isinstance(self.compile, bool):
            raise UserError(f"compile must be True or False, got {self.compile!r}")
        for name, is_optional in (("optimizer", False), ("scheduler", True), ("sampler", True)):
            value = getattr(self, name)
            if not callable(value) and not (is_optional and value is None):
                or_none = ", or None" if is_optional else ""
                kind = type(value).__name__
                raise UserError(f"{name} must be a function that makes one{or_none}, got an object of type {kind}")
        if self.clip_norm is not None and not as_number("clip_norm", self.clip_norm) > 0:
            raise UserError(f"clip_norm must be greater than 0, or None, got {self.clip_norm}")
