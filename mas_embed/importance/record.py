"""`Importance`: what an estimate returns, as sums and a count, so that shards merge exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.parameters import trainable_parameters
from mas_embed.runtime.atomic_files import read_tensors, write_tensors


class Importance(Mapping[str, Tensor]):
    """Parameter importance by parameter name: the mean over samples of the absolute per-sample gradient.

    Holds the sums over samples and their number; the division happens when a value is read.

    Args:
        sums: sum over samples, by parameter name, each in its parameter's shape; values >= 0.
        num_samples: how many samples were summed, >= 1.
        settings: how it was estimated: the output's name, granularity, exponent, embed. Only records of equal settings merge.
        fingerprint: of the parameters at which it was estimated, see `fingerprint_of`. Only records of one merge.

    Example:
        >>> record = Importance({"weight": torch.tensor([2.0, 4.0])}, num_samples=2)
        >>> record["weight"]
        tensor([1., 2.])
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        num_samples: int,
        settings: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if num_samples < 1:
            raise UserError(f"importance needs at least one sample, got num_samples={num_samples}")
        self._sums = dict(sums)
        self.num_samples = num_samples
        self.settings = dict(settings or {})
        self.fingerprint = fingerprint

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
            UserError: the records have different parameters, shapes, settings or fingerprints.
        """
        for other in others:
            if other.fingerprint != first.fingerprint:
                raise UserError("importance that was estimated at different weights does not merge")
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
        return cls(sums, sum(record.num_samples for record in (first, *others)), first.settings, first.fingerprint)

    def renamed(self, prefix: str) -> Importance:
        """The same record with a prefix before every parameter's name."""
        sums = {f"{prefix}{name}": total for name, total in self._sums.items()}
        return Importance(sums, self.num_samples, self.settings, self.fingerprint)

    def save(self, path: str | Path) -> None:
        """Writes the record as one safetensors file, atomically: sums as tensors; everything else as metadata."""
        description = {
            "kind": "importance",
            "num_samples": self.num_samples,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
        }
        write_tensors(Path(path), self._sums, description)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Importance:
        """Reads what `save` wrote.

        Args:
            path: of the file.
            model: the model it is to be used with; None does not check. Its weights may have moved on since: compare
                `fingerprint` with `fingerprint_of(model)` to know whether they have.

        Raises:
            UserError: there is no such file, it is not a saved `Importance`, or its parameters are not those of the model.
        """
        sums, description = read_tensors(Path(path))
        if description.get("kind") != "importance":
            raise UserError(f"{path} holds a {description.get('kind')}, not importance that Importance.save wrote")
        record = cls(sums, description["num_samples"], description["settings"], description["fingerprint"])
        if model is not None:
            record.check(model)
        return record

    def check(self, model: nn.Module) -> None:
        """Raises `UserError` naming the parameters that are not the model's, in name or shape, or that it lacks."""
        own = {name: parameter.shape for name, parameter in trainable_parameters(model).items()}
        shapes = _shapes(self)
        problems = {
            "not in the model": shapes.keys() - own.keys(),
            "not in the record": own.keys() - shapes.keys(),
            "of another shape": {name for name in shapes.keys() & own.keys() if shapes[name] != own[name]},
        }
        told = [f"{problem}: {', '.join(sorted(names))}" for problem, names in problems.items() if names]
        if told:
            raise UserError(f"the importance is of another model; {'; '.join(told)}")


def _shapes(record: Importance) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in record._sums.items()}
