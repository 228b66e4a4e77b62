"""Several methods at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.methods.base import METHODS, Keeps, Method
from mas_embed.methods.si import SI


@METHODS.register("combine")
class Combine(Method):
    """Does what all of its methods do, in their order: penalties add up, and each is handed the batch as the one before left it.

    In a config: `{name: combine, methods: [mas, {name: lwf, strength: 3}]}`.

    Args:
        model: the embedding model that is trained.
        methods: at least two, made with the same model. SI must be the first, because it reads the gradient before
            another adds to it; put IMM before what looks at the model when a split ends.
    """

    def __init__(self, model: nn.Module, *, methods: Sequence[Method]) -> None:
        super().__init__(model)
        if len(methods) < 2:
            raise UserError(f"combine needs at least two methods, got {len(methods)}")
        if any(method.model is not model for method in methods):
            raise UserError("the methods that are combined must be made with one and the same model")
        if any(isinstance(method, SI) for method in methods[1:]):
            raise UserError(
                "si must be the first of the methods that are combined: it reads the gradient before others add to it"
            )
        self.methods = list(methods)
        self.keeps = max((method.keeps for method in methods), key=get_args(Keeps).index)

    @property
    def is_learning(self) -> bool:
        """Whether all of them go on learning."""
        return all(method.is_learning for method in self.methods)

    def begin_split(self) -> None:
        for method in self.methods:
            method.begin_split()

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        for method in self.methods:
            inputs, labels = method.extend_batch(inputs, labels)
        return inputs, labels

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for method in self.methods:
            embeddings, labels = method.extend_embeddings(embeddings, labels)
        return embeddings, labels

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        penalties = [method.batch_penalty(inputs, embeddings) for method in self.methods]
        added = [penalty for penalty in penalties if penalty is not None]
        return torch.stack(added).sum() if added else None

    def penalty(self) -> Tensor:
        return torch.stack([method.penalty() for method in self.methods]).sum()

    def add_penalty_grad(self) -> None:
        for method in self.methods:
            method.add_penalty_grad()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for method in self.methods:
            method.after_step(optimizer)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split for each of them; an iterator's batches are kept in memory until all have read them."""
        batches = list(batches) if isinstance(batches, Iterator) else batches
        for method in self.methods:
            method.consolidate(batches)

    def state_dict(self) -> dict[str, Any]:
        """That of each, by its place."""
        return {str(index): method.state_dict() for index, method in enumerate(self.methods)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._check_state(state)
        for index, method in enumerate(self.methods):
            method.load_state_dict(state[str(index)])
