"""Replay, which stores samples of earlier splits and trains on them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_share, inputs_and_labels
from mas_embed.methods.rehearsal import num_rehearsed, rehearsal_generator
from mas_embed.runtime.checks import check_at_least, check_choice
from mas_embed.runtime.distributed import own_share, size_of_whole_batch
from mas_embed.runtime.forward import is_texts
from mas_embed.runtime.seeding import mixed_seed

Policy = Literal["reservoir", "balanced"]
_TEXTS = "bytes of texts"  # the name of their column
_END = 255  # fills the rows of texts; no text in UTF-8 holds this byte


@METHODS.register("replay")
class Replay(Method):
    """Stores a random sample of the items of earlier splits in a buffer of fixed size and adds some of them to every batch.

    When a split ends, every item of its batches gets a random key. With the policy "reservoir", the buffer holds the items
    with the smallest keys of all splits, so that every item is stored with the same probability (the distribution of Vitter's
    algorithm R, 1985). With the policy "balanced", it holds the items with the smallest keys of each split, the same number
    for every split; a split with too few items leaves its part of the buffer empty.

    From the second split on, items are drawn from the buffer without replacement and appended to every batch. The miner and
    the loss treat them like the other items. Items are stored on the CPU as the batches of `consolidate` hold them, which
    `train_sequence` does not augment, and are trained on without augmentation.

    Args:
        model: the embedding model that is trained.
        buffer_size: the largest number of stored items, >= 1.
        policy: "reservoir" or "balanced".
        share: the share of stored items in an extended batch, from 0 to below 1; less if the buffer holds too few items.
        seed: of the keys and of the draws from the buffer.

    Raises:
        UserError: an option is not accepted.
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
        check_at_least("buffer_size", buffer_size, 1)
        check_share(share)
        check_choice("policy", policy, get_args(Policy))
        self.buffer_size, self.policy, self.share, self.seed = buffer_size, policy, share, seed
        self.inputs: dict[str, Tensor] = {}
        self.labels = torch.empty(0, dtype=torch.long)
        self.splits = torch.empty(0, dtype=torch.long)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.num_splits = self._num_draws = 0

    @property
    def is_exact_in_processes(self) -> bool:
        """True: all processes draw the same items for a batch that they share, and each adds its share."""
        return True

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch with stored items appended; `inputs` is a tensor [N, ...], a mapping of such tensors, or a list of str."""
        num_added = num_rehearsed(size_of_whole_batch(len(labels)), self.share)
        if num_added == 0 or len(self.labels) == 0:
            return inputs, labels
        generator = rehearsal_generator(self.seed, self.num_splits, self._num_draws)
        self._num_draws += 1
        drawn = torch.randperm(len(self.labels), generator=generator)[:num_added]
        drawn = drawn[own_share(len(drawn))]
        extended_labels = _concat(labels, self.labels[drawn])
        if is_texts(inputs):
            _columns(inputs, self.inputs)
            return [*inputs, *_as_texts(self.inputs[_TEXTS][drawn])], extended_labels
        extended = {name: _concat(new, self.inputs[name][drawn]) for name, new in _columns(inputs, self.inputs).items()}
        return extended if isinstance(inputs, Mapping) else extended["inputs"], extended_labels

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: updates the buffer with its items.

        Args:
            batches: pairs `(inputs, labels)`.

        Raises:
            UserError: a batch has no labels, or its inputs are not tensors with the shape of the stored inputs.
        """
        split_index, self.num_splits = self.num_splits, self.num_splits + 1
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, split_index))
        for batch in batches:
            inputs, labels = inputs_and_labels(batch, "replay stores samples with their labels")
            keys = torch.rand(len(labels), generator=generator, dtype=torch.float64)
            columns = _columns(inputs, self.inputs)
            self.inputs = {
                name: _append(self.inputs[name], new) if self.inputs else new.detach().cpu()
                for name, new in columns.items()
            }
            self.labels = _concat(self.labels, labels)
            self.splits = _concat(self.splits, torch.full_like(labels, split_index, device="cpu"))
            self._keys = _concat(self._keys, keys)
            self._select(self._smallest_keys())

    def _state(self) -> dict[str, Any]:
        """The buffer, and the counters from which the next random draws are seeded."""
        return {
            "inputs": dict(self.inputs),
            "labels": self.labels,
            "splits": self.splits,
            "keys": self._keys,
            "num_splits": self.num_splits,
            "num_draws": self._num_draws,
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.inputs = {name: column.cpu().clone() for name, column in state["inputs"].items()}
        self.labels, self.splits, self._keys = (state[name].cpu().clone() for name in ("labels", "splits", "keys"))
        self.num_splits, self._num_draws = int(state["num_splits"]), int(state["num_draws"])

    def _smallest_keys(self) -> Tensor:
        """The indices of the items that stay in the buffer."""
        order = self._keys.argsort()
        if self.policy == "reservoir":
            return order[: self.buffer_size]
        size, remainder = divmod(self.buffer_size, self.num_splits)
        by_split = [order[self.splits[order] == index] for index in range(self.num_splits)]
        return torch.cat([indices[: size + (index < remainder)] for index, indices in enumerate(by_split)])

    def _select(self, indices: Tensor) -> None:
        """Removes all items from the buffer except those at the given indices."""
        self.inputs = {name: column[indices] for name, column in self.inputs.items()}
        self.labels, self.splits, self._keys = self.labels[indices], self.splits[indices], self._keys[indices]


def _columns(inputs: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The input tensors of a batch by name; raises `UserError` if they cannot be concatenated with the stored tensors."""
    columns = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if is_texts(inputs):
        columns = {_TEXTS: _as_bytes(inputs)}
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            raise UserError(
                f"replay stores tensors, but the inputs hold a {type(column).__name__}; give tensors [N, ...], or lists of str"
            )
        if stored and (name not in stored or (name != _TEXTS and stored[name].shape[1:] != column.shape[1:])):
            given = "texts" if name == _TEXTS else f"inputs of shape {list(column.shape[1:])}"
            raise UserError(f"replay cannot mix {given} with those stored; give all inputs the same shape")
    return columns


def _as_bytes(texts: Sequence[str]) -> Tensor:
    """The texts in UTF-8, one in a row, uint8 [N, bytes of the longest text]; shorter rows are filled up."""
    rows = [torch.tensor(list(text.encode(errors="surrogatepass")), dtype=torch.uint8) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_END)


def _as_texts(rows: Tensor) -> list[str]:
    return [bytes(row[row != _END].tolist()).decode(errors="surrogatepass") for row in rows]


def _append(stored: Tensor, new: Tensor) -> Tensor:
    """A stored column with new items; columns of texts are widened to the longer text."""
    if stored.ndim == 2 and new.ndim == 2 and stored.shape[1] != new.shape[1]:
        width = max(stored.shape[1], new.shape[1])
        stored, new = (F.pad(column, (0, width - column.shape[1]), value=_END) for column in (stored, new))
    return _concat(stored, new)


def _concat(first: Tensor, second: Tensor) -> Tensor:
    """Both tensors, concatenated along the first dimension, with the device and dtype of the first."""
    return torch.cat([first, second.detach().to(first)])
