"""`Importance` is the result of an estimate; it stores sums and a count, so that merging shards is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.parameters import trainable_parameters
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.checks import as_whole_number, shown


class Importance(Mapping[str, Tensor]):
    """Parameter importance by parameter name: the mean over samples of the absolute per-sample gradient.

    Stores the sums over samples and their number; a sum is divided by the number when it is read.

    Args:
        sums: the sum over samples by parameter name, in the parameter's shape, with values >= 0.
        num_samples: the number of samples in the sums, >= 1.
        settings: of the estimate (output, granularity, exponent, embed). Only records with equal settings can be merged.
        fingerprint: of the weights at which it was estimated, see `fingerprint_of`. Only records with equal fingerprints can be
            merged.

    Raises:
        UserError: `num_samples` is not a whole number >= 1, or another argument has a wrong type.

    Examples:
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
        if not isinstance(sums, Mapping) or not all(map(_is_named_tensor, sums.items())):
            raise UserError(
                "the sums of an importance must be a mapping from parameter name to a floating-point tensor"
            )
        if not isinstance(settings, Mapping | None):
            raise UserError(f"the settings of an importance must be a mapping, got {type(settings).__name__}")
        if not isinstance(fingerprint, str | None):
            raise UserError(f"the fingerprint of an importance must be a string, got {type(fingerprint).__name__}")
        self._sums = dict(sums)
        self.num_samples = as_whole_number("num_samples", num_samples, 1)
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
        """The importance over all samples, from records of disjoint sets of samples, whose sums and counts are added.

        Raises:
            UserError: the records have different parameters, shapes, settings or fingerprints.
        """
        for other in (first, *others):
            if not isinstance(other, Importance):
                raise UserError(
                    f"only records of importance can be merged, got an object of type {type(other).__name__}"
                )
            if other.fingerprint != first.fingerprint:
                raise UserError("importance that was estimated at different weights cannot be merged")
            if other.settings != first.settings:
                raise UserError(
                    f"importance with different settings cannot be merged: {first.settings} and {other.settings}"
                )
            if _shapes(first) != _shapes(other):
                differing = sorted({name for name, _ in _shapes(first).items() ^ _shapes(other).items()})
                raise UserError(
                    f"importance of different models cannot be merged; these parameters differ: {', '.join(differing)}"
                )
        sums = {
            name: torch.stack([record._sums[name].to(total.device) for record in (first, *others)]).sum(0)
            for name, total in first._sums.items()
        }
        return cls(sums, sum(record.num_samples for record in (first, *others)), first.settings, first.fingerprint)

    def renamed(self, prefix: str) -> Importance:
        """A copy of the record with a prefix before every parameter name."""
        sums = {f"{prefix}{name}": total for name, total in self._sums.items()}
        return Importance(sums, self.num_samples, self.settings, self.fingerprint)

    def save(self, path: str | Path) -> None:
        """Writes the record atomically to one safetensors file, with the sums as tensors and everything else as metadata."""
        description = {
            "kind": "importance",
            "num_samples": self.num_samples,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
        }
        write_tensors(Path(path), self._sums, description)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Importance:
        """Reads a record from a file that `save` wrote.

        Args:
            path: of the file.
            model: the model that the importance will be used with; its parameters must have the names and shapes of the
                record. None skips this check. To find out whether the weights have changed since the estimate, compare
                `fingerprint` with `fingerprint_of(model)`.

        Raises:
            UserError: there is no such file; it is not a saved `Importance`, or a damaged one; or its parameters do not match
                those of the model.
        """
        sums, description = read_tensors(Path(path))
        if description.get("kind") != "importance":
            raise UserError(
                f"{path} holds {shown(description.get('kind'))}, not an importance that Importance.save wrote"
            )
        try:
            record = cls(sums, description["num_samples"], description["settings"], description["fingerprint"])
        except KeyError as error:
            raise UserError(f"{path} is damaged: its description has no {error}") from None
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        for name, total in sums.items():
            if not bool((total.isfinite() & (total >= 0)).all()):
                raise UserError(f"{path} is damaged: the importance of '{name}' is negative, infinite or NaN")
        if model is not None:
            record.check(model)
        return record

    def check(self, model: nn.Module) -> None:
        """Raises `UserError` that names the parameters whose names or shapes differ between the record and the model."""
        expected = {name: parameter.shape for name, parameter in trainable_parameters(model).items()}
        shapes = _shapes(self)
        problems = {
            "not in the model": shapes.keys() - expected.keys(),
            "not in the record": expected.keys() - shapes.keys(),
            "of another shape": {name for name in shapes.keys() & expected.keys() if shapes[name] != expected[name]},
        }
        messages = [f"{problem}: {', '.join(sorted(names))}" for problem, names in problems.items() if names]
        if messages:
            raise UserError(f"the importance was estimated for another model; {'; '.join(messages)}")


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, total = item
    return isinstance(name, str) and isinstance(total, Tensor) and total.is_floating_point()


def _shapes(record: Importance) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in record._sums.items()}
