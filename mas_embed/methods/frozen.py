"""Training on the first split only, the reference without forgetting and without learning anything new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mas_embed.methods.base import METHODS, Method


@METHODS.register("frozen")
class Frozen(Method):
    """Trains on the first split and never changes the model again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.num_splits = 0

    @property
    def is_learning(self) -> bool:
        return self.num_splits == 0

    def consolidate(self, batches: Iterable[Any]) -> None:
        self.num_splits += 1

    def _state(self) -> dict[str, Any]:
        return {"num_splits": self.num_splits}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.num_splits = int(state["num_splits"])
