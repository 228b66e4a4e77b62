"""Where a sequence stands after a split, or within one, on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.evaluation import Evaluator
from mas_embed.methods import Method
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.checks import shown
from mas_embed.runtime.nested_state import flatten_state, unflatten_state

VERSION = 4
REMEDY = "delete it to train this sequence from its start"


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept.

    >>> previous_checkpoint(Path("checkpoint.safetensors")).name
    'checkpoint-previous.safetensors'
    """
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def lock_of_checkpoint(path: Path) -> Path:
    """The file that is locked while a training uses the checkpoint at `path`."""
    return path.with_name(f".{path.name}.lock")


def has_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint at `path`, or the one before it: a process may end while one takes the other's place."""
    return path.exists() or previous_checkpoint(path).exists()


def save_checkpoint(
    path: Path,
    model: nn.Module,
    method: Method,
    evaluator: Evaluator,
    progress: Mapping[str, Any],
    *,
    callbacks: Mapping[str, Any] | None = None,
    within_split: Mapping[str, Any] | None = None,
) -> None:
    """Writes where a sequence stands as one safetensors file, atomically; keeps the file before it.

    Args:
        path: of the file.
        model: of the sequence, like method and evaluator.
        method: of the sequence.
        evaluator: of the sequence.
        progress: what else is to be known, as JSON.
        callbacks: their states by name.
        within_split: the state of `SplitTraining`; None between splits.

    Raises:
        UserError: the file cannot be written.
        RunError: the disk is full. The checkpoints that were there before still are.
    """
    states = {
        "model": model.state_dict(),
        "method": method.state_dict(),
        "evaluator": evaluator.state_dict(),
        "callbacks": callbacks or {},
        "within_split": within_split or {},
    }
    tensors, numbers = flatten_state(states)
    description = {"kind": "checkpoint", "version": VERSION, "numbers": numbers, "progress": dict(progress)}
    try:
        write_tensors(path, tensors, description, keep_as=previous_checkpoint(path))
    except (UserError, RunError) as error:
        kept = (
            "; the checkpoint before it is kept, from which the training can be resumed" if has_checkpoint(path) else ""
        )
        raise type(error)(f"{error}{kept}") from error


def read_last_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `read_checkpoint`, of the checkpoint before it if the one at `path` cannot be used, which a warning tells.

    Raises:
        UserError: neither can be used.
    """
    previous = previous_checkpoint(path)
    if not path.exists():
        return read_checkpoint(previous)
    try:
        return read_checkpoint(path)
    except UserError as error:
        try:
            read = read_checkpoint(previous)
        except UserError:
            raise error from None
        reason = str(error).removesuffix(f"; {REMEDY}")
        warnings.warn(f"{reason}; training goes on from the checkpoint before it, {previous.name}", stacklevel=2)
        return read


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


@contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Raises what a state of another form leads to in its body as a `UserError` that names what is damaged."""
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what} is damaged: {reason_of(error)}; {REMEDY}") from error


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
