"""What every method offers to the loop over splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.forward import device_of
from mas_embed.importance import Importance
from mas_embed.registry import Registry

METHODS: Registry = Registry("method")


class Method:
    """How old knowledge is kept. This base keeps nothing: each hook is a no-op, and a method overrides what it needs.

    In a training loop::

        loss.backward()
        method.add_penalty_grad()      # or add method.penalty() to the loss
        optimizer.step()
        ...
        method.consolidate(batches)    # once, at the end of a split

    Args:
        model: the embedding model that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def is_learning(self) -> bool:
        """Whether the next split is to be trained on at all."""
        return True

    def penalty(self) -> Tensor:
        """A scalar to add to the loss, differentiable in the model's parameters; exactly 0 where nothing is protected."""
        return torch.zeros((), device=device_of(self.model))

    def add_penalty_grad(self) -> None:
        """Adds the penalty's gradient to the parameters' `.grad`, as `penalty()` in the loss would, at a lower cost.

        Call it once per optimizer step: after the last `backward()` of an accumulated batch, after a gradient scaler's
        `unscale_`, and before clipping.
        """

    def consolidate(self, batches: Iterable[Any]) -> Importance | None:
        """Ends a split: remembers what is needed of it. `batches` are inputs of the split; labels in them are ignored."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything the method remembers: tensors, numbers, and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, so that training goes on as if it had not stopped."""
