"""Values of rows, each of which belongs to a split: as they were when the split was learned, and as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mas_embed.evaluation.recording import NONE, Array


class LearnedAndNow:
    """Arrays [N, ...] by name, as they were when the split of each row was learned, and as they are now.

    Rows of splits that are not learned yet are NaN, or -1 where numbers are integers.

    Attributes:
        learned: the values at the first evaluation after the split of the row was learned.
        now: the values at the last evaluation.
    """

    def __init__(self) -> None:
        self.learned: dict[str, Array] = {}
        self.now: dict[str, Array] = {}
        self._is_learned = np.zeros(0, bool)

    def update(self, split_of_row: Array, split_index: int, **values: Array) -> None:
        """Takes over the values of an evaluation.

        Args:
            split_of_row: [N] of all rows, ascending.
            split_index: of the split that was learned last.
            values: arrays [n, ...] of the first n rows, by name; the others were not evaluated.
        """
        num_evaluated = len(next(iter(values.values())))
        self._grow(len(split_of_row), values)
        is_learned = (split_of_row <= split_index) & (np.arange(len(split_of_row)) < num_evaluated)
        is_new = is_learned & ~self._is_learned
        for name, value in values.items():
            self.now[name][is_learned] = value[is_learned[:num_evaluated]]
            self.learned[name][is_new] = value[is_new[:num_evaluated]]
        self._is_learned |= is_new

    def state_dict(self) -> dict[str, Any]:
        """All values, as tensors."""
        is_learned = torch.from_numpy(self._is_learned.copy())
        return {"learned": as_tensors(self.learned), "now": as_tensors(self.now), "is_learned": is_learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.learned, self.now = as_arrays(state["learned"]), as_arrays(state["now"])
        self._is_learned = state["is_learned"].numpy().copy()

    def _grow(self, num_rows: int, values: Mapping[str, Array]) -> None:
        """Makes room for rows of splits that were not evaluated before."""
        missing = num_rows - len(self._is_learned)
        if missing == 0:
            return
        self._is_learned = np.pad(self._is_learned, (0, missing))
        for arrays in (self.learned, self.now):
            for name, value in values.items():
                empty = np.full((missing, *value.shape[1:]), NONE if value.dtype.kind == "i" else np.nan, value.dtype)
                arrays[name] = np.concatenate([arrays[name], empty]) if name in arrays else empty


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Copies of arrays as tensors, by name."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Copies of tensors as arrays, by name."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
