"""The held-out items of the splits, embedded by the weights of one moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class HeldOut(NamedTuple):
    """The held-out items of every split, embedded by one set of weights: [Q, D] and [G, D]."""

    queries: list[Tensor]
    galleries: list[Tensor]


class BeforeSplit(NamedTuple):
    """Embeddings by the weights before a split: all held-out items, and the training inputs of that split."""

    held_out: HeldOut
    splits: list[str]  # whose items they are, by name
    split: str
    train: Tensor

    def as_state(self) -> dict[str, Any]:
        """The embeddings as a part of a state."""
        return {
            "queries": numbered(self.held_out.queries),
            "galleries": numbered(self.held_out.galleries),
            "splits": self.splits,
            "split": self.split,
            "train": self.train,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> BeforeSplit:
        """The embeddings in a part of a state."""
        held_out = HeldOut(in_order(state["queries"]), in_order(state["galleries"]))
        return cls(held_out, list(state["splits"]), str(state["split"]), state["train"])


def numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors by their position, as a state holds them."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def in_order(numbered: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of `numbered`, in their order."""
    return [numbered[index] for index in sorted(numbered, key=int)]
