"""Where a sequence stands after a split, on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mas_embed.errors import UserError, reason_of
from mas_embed.evaluation import Evaluator
from mas_embed.methods import Method
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.checks import shown
from mas_embed.runtime.nested_state import flatten_state, unflatten_state

VERSION = 2
REMEDY = "delete it to train this sequence from its start"


def save_checkpoint(
    path: Path, model: nn.Module, method: Method, evaluator: Evaluator, progress: Mapping[str, Any]
) -> None:
    """Writes the states of model, method and evaluator, and `progress` (JSON), as one safetensors file, atomically."""
    states = {"model": model.state_dict(), "method": method.state_dict(), "evaluator": evaluator.state_dict()}
    tensors, numbers = flatten_state(states)
    write_tensors(
        path, tensors, {"kind": "checkpoint", "version": VERSION, "numbers": numbers, "progress": dict(progress)}
    )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states that `load_states` takes, and `progress`.

    Raises:
        UserError: the file is not a checkpoint, is damaged, or was written by another version.
    """
    try:
        tensors, description = read_tensors(path)
    except UserError as error:
        raise UserError(f"the checkpoint cannot be used: {error}; {REMEDY}") from None
    if description.get("kind") != "checkpoint":
        raise UserError(f"{path} is not a checkpoint but holds {shown(description.get('kind'))}; name another file")
    if description.get("version") != VERSION:
        raise UserError(f"the checkpoint {path} was written by another version of mas-embed; {REMEDY}")
    progress, numbers = description.get("progress"), description.get("numbers")
    if not isinstance(progress, dict) or not isinstance(numbers, dict):
        raise UserError(f"the checkpoint {path} is damaged; {REMEDY}")
    return unflatten_state(tensors | numbers), progress


def load_states(
    states: Mapping[str, Any], model: nn.Module, method: Method, evaluator: Evaluator, *, source: Path
) -> None:
    """Takes model, method and evaluator back to where they were.

    Raises:
        UserError: the states are of another model, method or evaluator, or damaged; the message names `source`.
    """
    for name, component in (("model", model), ("method", method), ("evaluator", evaluator)):
        try:
            component.load_state_dict(states.get(name, {}))
        except Exception as error:
            raise UserError(f"the checkpoint {source} is of another {name}, or damaged: {reason_of(error)}") from error
