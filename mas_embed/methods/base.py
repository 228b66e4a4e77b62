"""What every method offers to the loop over splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.registry import Registry
from mas_embed.runtime.forward import device_of

METHODS = Registry("method")

Keeps = Literal["nothing", "statistics", "data"]
Loss = Callable[..., Tensor]  # (embeddings [N, D], labels [N], mined) -> []


class Method:
    """How old knowledge is kept. This base keeps nothing: each hook is a no-op, and a method overrides what it needs.

    In a training loop::

        method.begin_split()
        for inputs, labels in batches:
            inputs, labels = method.extend_batch(inputs, labels)
            embeddings = model(inputs)
            extra = method.batch_penalty(inputs, embeddings)
            embeddings, labels = method.extend_embeddings(embeddings, labels)
            value = loss(embeddings, labels)
            (value if extra is None else value + extra).backward()
            method.add_penalty_grad()      # or add method.penalty() to the loss
            optimizer.step()
            method.after_step(optimizer)
            optimizer.zero_grad()
        method.consolidate(batches)        # once, at the end of a split

    Where gradients are accumulated, `extend_batch`, `batch_penalty` and `extend_embeddings` are called for every batch,
    `add_penalty_grad` and `after_step` for every step of the optimizer. In several processes all hooks are called in each.
    Everything that a method does is a no-op before the first `consolidate`, apart from what it writes down.

    `mas_embed.testing.check_method` checks what is promised here.

    Args:
        model: the embedding model that is trained; where it is wrapped for several processes, the model inside.

    Attributes:
        keeps: what is stored of the data of earlier splits, which tables mark: "nothing", "statistics" of classes, or
            samples ("data"). A copy of the model, and what is known of its parameters, is no data.
        joins_splits: whether an experiment trains the method on one split that holds the items of all, as joint training is
            trained, instead of on one split after another.
        name: by which callbacks, tables and folders call it; the class's name unless it is set.
    """

    keeps: Keeps = "nothing"
    joins_splits: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = type(self).__name__

    @property
    def is_learning(self) -> bool:
        """Whether the next split is to be trained on at all."""
        return True

    @property
    def num_bytes(self) -> int:
        """The memory of everything that is remembered between splits: the tensors of the state, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.state_dict()))

    def begin_split(self) -> None:
        """Called before a split is trained on."""

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """What is trained on instead of a batch of the split; the batch itself where nothing is added."""
        return inputs, labels

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the miner and the loss see of a batch, embeddings [N, D] and labels [N]; more rows where something is added."""
        return embeddings, labels

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """A scalar to add to the loss of a batch, differentiable in its embeddings [N, D]; None adds nothing at all."""
        return None

    def penalty(self) -> Tensor:
        """A scalar to add to the loss, differentiable in the model's parameters; exactly 0 where nothing is protected."""
        return torch.zeros((), device=device_of(self.model))

    def add_penalty_grad(self) -> None:
        """Adds the penalty's gradient to the parameters' `.grad`, as `penalty()` in the loss would, at a lower cost.

        Call it once per optimizer step: after the last `backward()` of an accumulated batch, after a gradient scaler's
        `unscale_`, and before clipping.
        """

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every `optimizer.step()` that was taken, before the gradients are cleared; not for a skipped one."""

    def consolidate(self, batches: Iterable[Any]) -> Importance | None:
        """Ends a split: remembers what is needed of it.

        Args:
            batches: the split's, `(inputs, labels)` each. A method that takes nothing from labels says so, and is content
                with unlabeled inputs.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything the method remembers: tensors, numbers, and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, so that training goes on as if it had not stopped."""

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` for a state that lacks what this method's has."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise UserError(f"the state lacks {', '.join(sorted(missing))}; it is not one of {type(self).__name__}")


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
