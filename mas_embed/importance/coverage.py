"""`explain_coverage` lists how the importance of each parameter of a model is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mas_embed.importance.engine import BatchImportance, CoverageKind, parameter_owners
from mas_embed.importance.outputs import Vector
from mas_embed.importance.rules import rule_of
from mas_embed.runtime.forward import Embed, batch_to, check_module, device_of
from mas_embed.runtime.modes import eval_mode_with_grad


@dataclass(frozen=True)
class CoverageRow:
    """One parameter of a model.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        layer: the class name of the layer that holds it.
        kind: how its importance is computed, see `explain_coverage`.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    kind: CoverageKind


@dataclass(frozen=True)
class Coverage(Mapping[str, CoverageKind]):
    """A mapping from the name of every parameter to how its importance is computed; `print` shows it as a table.

    Attributes:
        rows: one row per parameter, in the order of `model.named_parameters()`.
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
    """Lists how `estimate_importance` computes the importance of each parameter of a model.

    - "rule": the exact rule of its layer, or that of parameters which the samples use in matrix products, additions,
      multiplications and look-ups (attention, reused weights, position embeddings); both run within the ordinary backward pass;
    - "fallback": per-sample gradients by `torch.func` (or by a loop, if `torch.func` fails on the model), which are exact too,
      but slower, because they differentiate the whole model for every sample;
    - "frozen": the parameter has `requires_grad=False` and is left out;
    - "unused": the embeddings do not depend on the parameter, so its importance is zero.

    Args:
        model: the embedding model.
        batch: a batch of inputs, on which the model is run as `estimate_importance` would run it; it shows all kinds only with
            at least two samples. Without a batch, the kinds are derived from the layers alone: unused parameters, layers that
            run several times and uses of a parameter outside its layer are not noticed, and parameters whose rule depends on
            how the samples use them, such as those of `nn.MultiheadAttention`, are shown as "fallback".
        embed: how to embed a batch, see `estimate_importance`.

    Returns:
        A mapping from parameter name to one of the four kinds.

    Raises:
        UserError: the model is no module, or `batch` is one that `estimate_importance` refuses.

    Examples:
        >>> import torch
        >>> print(explain_coverage(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Bilinear(3, 3, 1, bias=False))))
        parameter  shape  layer     importance by
        0.weight   3x2    Linear    rule
        0.bias     3      Linear    rule
        1.weight   1x3x3  Bilinear  fallback
        2 rule, 1 fallback
    """
    check_module(model)
    owners = parameter_owners(model)
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    kinds = _kinds_by_layer(model) if batch is None or is_frozen else _kinds_on_batch(model, batch, embed)
    rows = [
        CoverageRow(name, tuple(parameter.shape), type(owners[parameter][0][0]).__name__, kinds[name])
        for name, parameter in model.named_parameters()
    ]
    return Coverage(tuple(rows))


def _kinds_by_layer(model: nn.Module) -> dict[str, CoverageKind]:
    kinds: dict[str, CoverageKind] = {}
    owners = parameter_owners(model)
    for name, parameter in model.named_parameters():
        (layer, local_name), *others = owners[parameter]
        rule = rule_of(layer)
        if not parameter.requires_grad:
            kinds[name] = "frozen"
        else:
            kinds[name] = "rule" if rule and local_name in rule.parameters and not others else "fallback"
    return kinds


def _kinds_on_batch(model: nn.Module, batch: Any, embed: Embed | str | None) -> dict[str, CoverageKind]:
    batch_importance = BatchImportance(model, output=Vector(), exponent=1, embed=embed)
    with eval_mode_with_grad(model):
        return batch_importance.coverage_of(batch_to(batch, device_of(model)))
