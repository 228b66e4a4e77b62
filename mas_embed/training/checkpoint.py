"""Where a sequence stands after a split, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.evaluation import Evaluator
from mas_embed.methods import Method
from mas_embed.runtime.atomic_files import read_tensors, write_tensors


def save_checkpoint(
    path: Path, model: nn.Module, method: Method, evaluator: Evaluator, progress: Mapping[str, Any]
) -> None:
    """Writes the states of model, method and evaluator, and `progress` (JSON), as one safetensors file, atomically."""
    states = {"model": model.state_dict(), "method": method.state_dict(), "evaluator": evaluator.state_dict()}
    tensors, numbers = _flatten(states)
    write_tensors(path, tensors, {"kind": "checkpoint", "numbers": numbers, "progress": progress})


def load_checkpoint(
    path: Path, model: nn.Module, method: Method, evaluator: Evaluator, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Takes model, method and evaluator back to where they were; returns `progress`, whose "plan" must be the given one.

    Raises:
        UserError: the file is not a checkpoint, or one of another model, plan or evaluator.
    """
    tensors, description = read_tensors(path)
    if description.get("kind") != "checkpoint":
        raise UserError(f"{path} is not a checkpoint but holds {description.get('kind')}")
    stored = description["progress"]["plan"]
    for name, value in plan.items():
        if stored.get(name) != value:
            raise UserError(
                f"the checkpoint {path} is of another sequence: its {name} is {stored.get(name)}, not {value}"
            )
    state = _unflatten(tensors | description["numbers"])
    try:
        model.load_state_dict(state.get("model", {}))
    except RuntimeError as error:
        raise UserError(f"the checkpoint {path} is of another model: {' '.join(str(error).split())}") from None
    method.load_state_dict(state.get("method", {}))
    evaluator.load_state_dict(state.get("evaluator", {}))
    return dict(description["progress"])


def _flatten(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested dicts as flat ones, keys joined by '/': tensors, and everything else."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            inner_tensors, inner_others = _flatten(value, f"{prefix}{key}/")
            tensors |= inner_tensors
            others |= inner_others or ({} if value else {f"{prefix}{key}": {}})
        elif isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value
        else:
            others[f"{prefix}{key}"] = value
    return tensors, others


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, key = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = value
    return nested
