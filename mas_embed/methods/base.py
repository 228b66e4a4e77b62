"""The base class of all methods, which defines the hooks that the training loop calls."""

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
    """A method of continual learning: it reduces the forgetting of earlier splits while a model learns a new one.

    The hooks of this base class do nothing, which is plain finetuning. A method overrides the hooks that it needs.

    A training loop calls the hooks as follows::

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

    With gradient accumulation, `extend_batch`, `batch_penalty` and `extend_embeddings` are called for every batch, and
    `add_penalty_grad` and `after_step` for every step of the optimizer. With several processes, every process calls all hooks.
    Before the first `consolidate`, the hooks must not change the training; they may only record it.

    `mas_embed.testing.check_method` tests whether a method fulfils this contract.

    Args:
        model: the embedding model that is trained. If it is wrapped for several processes, the model inside the wrapper.

    Attributes:
        keeps: which data of earlier splits the method stores: "nothing", "statistics" of classes, or samples ("data"). Copies
            of the model and values for its parameters do not count as data. Reports show this attribute.
        joins_splits: whether an experiment trains the method on one split with the items of all splits, as in joint training,
            instead of on one split after another.
        name: the name of the method for callbacks, tables and folders; by default the name of the class.
    """

    keeps: Keeps = "nothing"
    joins_splits: bool = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = type(self).__name__

    @property
    def is_learning(self) -> bool:
        """Whether the next split is trained on."""
        return True

    @property
    def num_bytes(self) -> int:
        """The memory that the method needs between splits: the size of the tensors in its state, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.state_dict()))

    def begin_split(self) -> None:
        """Called before the training on a split starts."""

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch that is trained on: the given batch, with further items appended if the method adds any."""
        return inputs, labels

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings [N, D] and labels [N] for the miner and the loss, with further rows appended if the method adds any."""
        return embeddings, labels

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """A scalar to add to the loss of a batch, differentiable in its embeddings [N, D]; None if there is nothing to add."""
        return None

    def penalty(self) -> Tensor:
        """A scalar to add to the loss, differentiable in the model's parameters; exactly 0 before the first `consolidate`."""
        return torch.zeros((), device=device_of(self.model))

    def add_penalty_grad(self) -> None:
        """Adds the gradient of `penalty()` to the `.grad` of the parameters, which is cheaper than a penalty in the loss.

        Call it once per optimizer step: after the last `backward()` of accumulated batches, after the `unscale_` of a gradient
        scaler, and before gradients are clipped.
        """

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every `optimizer.step()` that was not skipped, before the gradients are cleared."""

    def consolidate(self, batches: Iterable[Any]) -> Importance | None:
        """Ends a split: stores what the method needs of it for the following splits.

        Args:
            batches: pairs `(inputs, labels)` of the split. A method that ignores labels also accepts unlabeled inputs.

        Returns:
            The importance of the split, from methods that estimate it; else None.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the method stores between splits, as tensors, numbers, and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`, so that training continues as if it had not been interrupted."""

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` for a state that lacks one of the keys of this method's state."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise UserError(f"the state lacks {', '.join(sorted(missing))}; it is not a state of {type(self).__name__}")


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
