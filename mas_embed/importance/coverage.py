"""`explain_coverage`: how the importance of each parameter is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mas_embed.importance.engine import BatchImportance, CoverageKind, parameter_owners
from mas_embed.importance.outputs import Vector
from mas_embed.importance.rules import rule_of
from mas_embed.runtime.forward import Embed, batch_to, device_of
from mas_embed.runtime.modes import eval_mode_with_grad


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: its name, its shape, the class of the layer that holds it, and how its importance is computed."""

    name: str
    shape: tuple[int, ...]
    layer: str
    kind: CoverageKind


@dataclass(frozen=True)
class Coverage(Mapping[str, CoverageKind]):
    """By parameter name how its importance is computed; printed as a table.

    Attributes:
        rows: one for each parameter of the model.
    """

    rows: tuple[CoverageRow, ...]

    def __getitem__(self, name: str) -> CoverageKind:
        for row in self.rows:
            if row.name == name:
                return row.kind
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "shape", "layer", "importance by")]
        cells += [(row.name, "x".join(map(str, row.shape)) or "scalar", row.layer, row.kind) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        counts = Counter(self.values())
        return "\n".join([*lines, ", ".join(f"{count} {kind}" for kind, count in counts.items())])


def explain_coverage(model: nn.Module, batch: Any = None, *, embed: Embed | str | None = None) -> Coverage:
    """How the importance of every parameter of a model is computed, each parameter in exactly one row.

    - "rule": an exact rule for its layer, at the cost of the backward pass;
    - "fallback": exact per-sample gradients, slower (no rule for its layer; used more than once; shared between
      layers);
    - "frozen": `requires_grad=False`, left out;
    - "unused": the embeddings do not depend on it, importance zero.

    Args:
        model: the embedding model.
        batch: with one, the model is run on it, as `estimate_importance` would run it. Without, the table is read off the
            layers: reuse outside of layers and unused parameters are then not seen.
        embed: see `estimate_importance`.

    Example:
        >>> import torch
        >>> print(explain_coverage(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Bilinear(3, 3, 1, bias=False))))
        parameter  shape  layer     importance by
        0.weight   3x2    Linear    rule
        0.bias     3      Linear    rule
        1.weight   1x3x3  Bilinear  fallback
        2 rule, 1 fallback
    """
    owners = parameter_owners(model)
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    kinds = _coverage_by_layer(model) if batch is None or is_frozen else _coverage_on(model, batch, embed)
    rows = [
        CoverageRow(name, tuple(parameter.shape), type(owners[parameter][0][0]).__name__, kinds[name])
        for name, parameter in model.named_parameters()
    ]
    return Coverage(tuple(rows))


def _coverage_by_layer(model: nn.Module) -> dict[str, CoverageKind]:
    kinds: dict[str, CoverageKind] = {}
    owners = parameter_owners(model)
    for name, parameter in model.named_parameters():
        (layer, local_name), *others = owners[parameter]
        found = rule_of(layer)
        if not parameter.requires_grad:
            kinds[name] = "frozen"
        else:
            kinds[name] = "rule" if found and local_name in found.parameters and not others else "fallback"
    return kinds


def _coverage_on(model: nn.Module, batch: Any, embed: Embed | str | None) -> dict[str, CoverageKind]:
    plan = BatchImportance(model, output=Vector(), exponent=1, embed=embed)
    with eval_mode_with_grad(model):
        return plan.plan(batch_to(batch, device_of(model)))
