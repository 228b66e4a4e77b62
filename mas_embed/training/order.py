"""The order of the items of a split, drawn anew for every epoch, which a resumed training draws again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mas_embed.errors import UserError
from mas_embed.runtime.seeding import random_state, set_random_state


class ResumableOrder(Sampler[int]):
    """The indices of a sampler, of which an epoch can be drawn again and begun in its middle.

    A pass draws all its indices when it begins, and stores the states of the random generators that they are drawn under. From
    these the passes are repeated one after the other, because a sampler may remember things from pass to pass.

    Args:
        sampler: of one epoch, or a list of indices. It draws from the global generators of Python, NumPy and torch, or from
            one of its own.

    Attributes:
        num_skipped: items at the start of the last pass that were left out.
    """

    def __init__(self, sampler: Iterable[int]) -> None:
        self.sampler = sampler
        self.num_skipped = 0
        self._random_states: list[dict[str, Tensor]] = []  # one a pass
        self._checksum = 0  # of the last pass
        self._is_repeated = False  # whether the next pass is the last one again

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass is to samplers that want to know."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        if self._is_repeated:
            set_random_state(self._random_states[-1])
            indices = list(self.sampler)
            if _checksum(indices) != self._checksum:
                raise UserError(
                    "the sampler has not drawn the order that it drew before training was interrupted, so the split cannot be "
                    "resumed in its middle; let the sampler draw from the global generators only"
                )
        else:
            self.num_skipped = 0
            self._random_states.append(random_state())
            indices = list(self.sampler)
            self._checksum = _checksum(indices)
        self._is_repeated = False
        return islice(indices, self.num_skipped, None)

    def state_dict(self) -> dict[str, Any]:
        """The random states of all passes so far, and a checksum of the last."""
        states = self._random_states
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]} if states else {}
        return {"random_states": stacked, "checksum": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any], *, num_skipped: int | None) -> None:
        """Goes on from a state of an order of the same sampler; the passes before the last are drawn again at once.

        Args:
            state: from `state_dict`.
            num_skipped: the next pass is the last one again, without that many items at its start; None for a new pass.
        """
        stacked = state["random_states"]
        number = len(next(iter(stacked.values()))) if stacked else 0
        self._random_states = [{name: rows[index] for name, rows in stacked.items()} for index in range(number)]
        self._checksum, self._is_repeated = int(state["checksum"]), num_skipped is not None
        self.num_skipped = num_skipped or 0
        for epoch, of_pass in enumerate(self._random_states[: -1 if self._is_repeated else None]):
            self.set_epoch(epoch)
            set_random_state(of_pass)
            for _ in self.sampler:
                pass


def _checksum(indices: list[Any]) -> int:
    return hash(tuple(indices))
