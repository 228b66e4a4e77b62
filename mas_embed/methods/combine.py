"""Several methods that are applied together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.methods.base import METHODS, AnchoredParameter, Keeps, Method
from mas_embed.methods.si import SI


@METHODS.register("combine")
class Combine(Method):
    """Calls the hooks of several methods in order: penalties are added up, and each method extends the batch of the one before.

    In a config: `{name: combine, methods: [mas, {name: lwf, strength: 3}]}`.

    Args:
        model: the embedding model that is trained.
        methods: at least two methods, made with the same model. SI must be the first, because it reads the gradient before
            other methods add to it. Put IMM, which changes the model when a split ends, before methods that then read the
            model.

    Raises:
        UserError: there are fewer than two methods, they belong to different models, or SI is not the first.
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
        self.consolidates_shares = all(method.consolidates_shares for method in methods)
        self.keeps = max((method.keeps for method in methods), key=get_args(Keeps).index)

    @property
    def is_learning(self) -> bool:
        """Whether all methods train on the next split."""
        return all(method.is_learning for method in self.methods)

    @property
    def batch_hooks(self) -> frozenset[str]:
        """The hooks that any of the methods overrides."""
        return frozenset().union(*(method.batch_hooks for method in self.methods))

    @property
    def is_exact_in_processes(self) -> bool:
        """Whether all methods are."""
        return all(method.is_exact_in_processes for method in self.methods)

    @property
    def acts_after_step(self) -> bool:
        """Whether any of the methods needs `after_step`."""
        return any(method.acts_after_step for method in self.methods)

    @property
    def num_bytes(self) -> int:
        """The memory that all methods need between splits, in bytes."""
        return sum(method.num_bytes for method in self.methods)

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
        terms = [penalty for penalty in penalties if penalty is not None]
        return torch.stack(terms).sum() if terms else None

    def penalty(self) -> Tensor:
        return torch.stack([method.penalty() for method in self.methods]).sum()

    def add_penalty_grad(self) -> None:
        for method in self.methods:
            method.add_penalty_grad()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for method in self.methods:
            method.after_step(optimizer)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Consolidates every method. The batches of an iterator are held in memory until all methods have read them."""
        batches = list(batches) if isinstance(batches, Iterator) else batches
        for method in self.methods:
            method.consolidate(batches)

    def anchored_parameters(self) -> dict[str, AnchoredParameter]:
        """Those of the first of the methods that has any."""
        return next((found for found in (method.anchored_parameters() for method in self.methods) if found), {})

    def _state(self) -> dict[str, Any]:
        """The states of the methods by their index, "0" first."""
        return {str(index): method.state_dict() for index, method in enumerate(self.methods)}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the states of all methods."""
        for index, method in enumerate(self.methods):
            method.load_state_dict(state[str(index)])
