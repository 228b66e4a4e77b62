"""Replay: samples of earlier splits are stored and trained on again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_choice, check_share, inputs_and_labels
from mas_embed.methods.rehearsal import num_rehearsed, rehearsal_generator
from mas_embed.runtime.seeding import mixed_seed

Policy = Literal["reservoir", "balanced"]


@METHODS.register("replay")
class Replay(Method):
    """Stored samples are mixed into every batch; the only method here that keeps samples.

    When a split ends, its samples compete for the places of a buffer of fixed size. Every sample ever seen draws a random key
    once, and the smallest keys stay: of all samples under "reservoir", which gives each the same chance (the distribution of
    Vitter's algorithm R, 1985), of each split under "balanced", which gives each split the same number of places (a
    split with fewer samples leaves its places empty). From the second split on, every batch is extended by stored
    samples, drawn without repetition; the miner and the loss see both as one. Samples are stored on the CPU as they came,
    without the augmentation of later epochs.

    Args:
        model: the embedding model that is trained.
        buffer_size: how many samples are stored at most, >= 1.
        policy: "reservoir" or "balanced".
        share: of the samples that are trained on, how many are stored ones, from 0 to below 1; fewer where the buffer has not
            as many.
        seed: of the keys and of the draws; processes draw differently.
    """

    keeps = "data"

    def __init__(
        self,
        model: nn.Module,
        *,
        buffer_size: int = 200,
        policy: Policy = "reservoir",
        share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if buffer_size < 1:
            raise UserError(f"buffer_size must be at least 1, got {buffer_size}")
        check_share(share)
        check_choice("policy", policy, get_args(Policy))
        self.buffer_size, self.policy, self.share, self.seed = buffer_size, policy, share, seed
        self.inputs: dict[str, Tensor] = {}
        self.labels = torch.empty(0, dtype=torch.long)
        self.splits = torch.empty(0, dtype=torch.long)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.num_splits = self._num_draws = 0

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch with stored samples behind it; `inputs` are a tensor or a mapping of tensors, samples first."""
        wanted = num_rehearsed(len(labels), self.share)
        if wanted == 0 or len(self.labels) == 0:
            return inputs, labels
        generator = rehearsal_generator(self.seed, self.num_splits, self._num_draws)
        self._num_draws += 1
        chosen = torch.randperm(len(self.labels), generator=generator)[:wanted]
        both = {name: _joined(new, self.inputs[name][chosen]) for name, new in _columns(inputs, self.inputs).items()}
        return both if isinstance(inputs, Mapping) else both["inputs"], _joined(labels, self.labels[chosen])

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: its samples compete for the places of the buffer.

        Args:
            batches: `(inputs, labels)` each.

        Raises:
            UserError: a batch has no labels, or its inputs are not tensors of the shape of those stored.
        """
        split_index, self.num_splits = self.num_splits, self.num_splits + 1
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, split_index))
        for batch in batches:
            inputs, labels = inputs_and_labels(batch, "replay stores samples with their labels")
            keys = torch.rand(len(labels), generator=generator, dtype=torch.float64)
            columns = _columns(inputs, self.inputs)
            self.inputs = {
                name: _joined(self.inputs[name], new) if self.inputs else new.detach().cpu()
                for name, new in columns.items()
            }
            self.labels = _joined(self.labels, labels)
            self.splits = _joined(self.splits, torch.full_like(labels, split_index, device="cpu"))
            self._keys = _joined(self._keys, keys)
            self._keep(self._smallest_keys())

    def state_dict(self) -> dict[str, Any]:
        """The stored samples, and where the random draws stand."""
        return {
            "inputs": dict(self.inputs),
            "labels": self.labels,
            "splits": self.splits,
            "keys": self._keys,
            "num_splits": self.num_splits,
            "num_draws": self._num_draws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state."""
        self._check_state(state)
        self.inputs = {name: column.cpu().clone() for name, column in state["inputs"].items()}
        self.labels, self.splits, self._keys = (state[name].cpu().clone() for name in ("labels", "splits", "keys"))
        self.num_splits, self._num_draws = int(state["num_splits"]), int(state["num_draws"])

    def _smallest_keys(self) -> Tensor:
        """Which of the stored samples stay."""
        order = self._keys.argsort()
        if self.policy == "reservoir":
            return order[: self.buffer_size]
        places, left_over = divmod(self.buffer_size, self.num_splits)
        of_splits = [order[self.splits[order] == index] for index in range(self.num_splits)]
        return torch.cat([own[: places + (index < left_over)] for index, own in enumerate(of_splits)])

    def _keep(self, chosen: Tensor) -> None:
        self.inputs = {name: column[chosen] for name, column in self.inputs.items()}
        self.labels, self.splits, self._keys = self.labels[chosen], self.splits[chosen], self._keys[chosen]


def _columns(inputs: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch's inputs by name, which must fit to those that are stored, if any are."""
    columns = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            raise UserError(
                f"replay stores tensors, but the inputs hold a {type(column).__name__}; give tensors [N, ...]"
            )
        if stored and (name not in stored or stored[name].shape[1:] != column.shape[1:]):
            raise UserError(
                f"replay cannot mix inputs of shape {list(column.shape[1:])} with what it has stored; give all samples one shape"
            )
    return columns


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Both, one behind the other, where the first is."""
    return torch.cat([first, second.detach().to(first)])
