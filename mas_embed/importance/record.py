"""`Importance`: what an estimate returns, as sums and a count, so that shards merge exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.files import read_tensors, write_tensors


class Importance(Mapping[str, Tensor]):
    """Parameter importance by parameter name: the mean over samples of the absolute per-sample gradient.

    Holds the sums over samples and their number; the division happens when a value is read.

    Args:
        sums: sum over samples, by parameter name, each in its parameter's shape; values >= 0.
        num_samples: how many samples were summed, >= 1.
        settings: how it was estimated: the output's name, granularity, exponent. Only records of equal settings merge.

    Example:
        >>> record = Importance({"weight": torch.tensor([2.0, 4.0])}, num_samples=2)
        >>> record["weight"]
        tensor([1., 2.])
    """

    def __init__(self, sums: Mapping[str, Tensor], num_samples: int, settings: Mapping[str, Any] | None = None) -> None:
        if num_samples < 1:
            raise UserError(f"importance needs at least one sample, got num_samples={num_samples}")
        self._sums = dict(sums)
        self.num_samples = num_samples
        self.settings = dict(settings or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name] / self.num_samples

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __repr__(self) -> str:
        numel = sum(tensor.numel() for tensor in self._sums.values())
        return f"Importance({len(self)} parameters, {numel:,} values, {self.num_samples:,} samples, {self.settings})"

    @classmethod
    def merge(cls, first: Importance, *others: Importance) -> Importance:
        """The importance of all samples together, from records of disjoint sets of samples: sums and counts are added.

        Raises:
            UserError: the records have different parameters, shapes or settings.
        """
        for other in others:
            if other.settings != first.settings:
                raise UserError(
                    f"importance of different settings does not merge: {first.settings} and {other.settings}"
                )
            if _shapes(first) != _shapes(other):
                differing = sorted({name for name, _ in _shapes(first).items() ^ _shapes(other).items()})
                raise UserError(
                    f"importance of different models does not merge; these parameters differ: {', '.join(differing)}"
                )
        sums = {name: torch.stack([record._sums[name] for record in (first, *others)]).sum(0) for name in first}
        return cls(sums, sum(record.num_samples for record in (first, *others)), first.settings)

    def save(self, path: str | Path) -> None:
        """Writes the record as one safetensors file (sums as tensors; count and settings as metadata), atomically."""
        description = {"kind": "importance", "num_samples": self.num_samples, "settings": self.settings}
        write_tensors(Path(path), self._sums, description)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is not a saved `Importance`.
        """
        sums, description = read_tensors(Path(path))
        if description.get("kind") != "importance":
            raise UserError(f"{path} holds a {description.get('kind')}, not importance that Importance.save wrote")
        return cls(sums, description["num_samples"], description["settings"])


def _shapes(record: Importance) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in record._sums.items()}
