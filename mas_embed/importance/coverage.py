"""`explain_coverage`: which way each parameter's importance is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mas_embed.forward import Embed, batch_to, device_of, differentiating
from mas_embed.importance.engine import BatchImportance, Way, parameter_owners
from mas_embed.importance.outputs import Vector
from mas_embed.importance.rules import rule_of


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: its name, shape, the layer that holds it, and the way its importance is computed."""

    name: str
    shape: tuple[int, ...]
    layer: str
    way: Way


@dataclass(frozen=True)
class Coverage:
    """A table of all parameters of a model, one row each; `str()` prints it, `way[name]` looks one up."""

    rows: tuple[CoverageRow, ...]

    @property
    def way(self) -> dict[str, Way]:
        """The way by parameter name."""
        return {row.name: row.way for row in self.rows}

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "shape", "layer", "importance by")]
        cells += [(row.name, "x".join(map(str, row.shape)) or "scalar", row.layer, row.way) for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        counts = Counter(row.way for row in self.rows)
        return "\n".join([*lines, ", ".join(f"{count} {way}" for way, count in counts.items())])


def explain_coverage(model: nn.Module, batch: Any = None, *, embed: Embed | str | None = None) -> Coverage:
    """Which way the importance of every parameter of the model goes, each parameter in exactly one row.

    - "rule": an exact rule for its layer, at the cost of the backward pass;
    - "fallback": exact per-sample gradients, slower (no rule for its layer; used more than once; shared between
      layers);
    - "frozen": `requires_grad=False`, left out;
    - "unused": the embeddings do not depend on it, importance zero.

    Args:
        model: the embedding model.
        batch: with one, the model is run on it and what is told is what happens. Without, the way is read off the
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
    ways = _ways_by_layer(model) if batch is None or is_frozen else _ways_on(model, batch, embed)
    rows = [
        CoverageRow(name, tuple(parameter.shape), type(owners[parameter][0][0]).__name__, ways[name])
        for name, parameter in model.named_parameters()
    ]
    return Coverage(tuple(rows))


def _ways_by_layer(model: nn.Module) -> dict[str, Way]:
    ways: dict[str, Way] = {}
    owners = parameter_owners(model)
    for name, parameter in model.named_parameters():
        (layer, local_name), *others = owners[parameter]
        found = rule_of(layer)
        if not parameter.requires_grad:
            ways[name] = "frozen"
        else:
            ways[name] = "rule" if found and local_name in found.parameters and not others else "fallback"
    return ways


def _ways_on(model: nn.Module, batch: Any, embed: Embed | str | None) -> dict[str, Way]:
    plan = BatchImportance(model, output=Vector(), exponent=1, embed=embed)
    with differentiating(model):
        return plan.plan(batch_to(batch, device_of(model)))
