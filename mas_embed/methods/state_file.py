"""What a method knows, in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from mas_embed.errors import UserError
from mas_embed.methods.base import Method
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.checks import shown
from mas_embed.runtime.nested_state import flatten_state, unflatten_state

_KIND, _VERSION = "method", 1


def save_method(path: str | os.PathLike[str], method: Method) -> None:
    """Writes the state of a method as a safetensors file, without pickle. An earlier file is replaced only by a complete one.

    Raises:
        UserError: the file cannot be written.
        RunError: the disk is full.
    """
    tensors, numbers = flatten_state(method.state_dict())
    write_tensors(Path(path), tensors, {"kind": _KIND, "version": _VERSION, "numbers": numbers})


def load_method(path: str | os.PathLike[str], method: Method) -> None:
    """Takes a method back to the state in a file of `save_method`.

    The model must have the weights that it had when the state was saved, see `Method.load_state_dict`.

    Raises:
        UserError: the file is missing, damaged or no such file; or the state is of another method, or of other weights.
    """
    tensors, description = read_tensors(Path(path))
    numbers = description.get("numbers")
    if description.get("kind") != _KIND:
        raise UserError(
            f"{path} is not the state of a method but holds {shown(description.get('kind'))}; name another file"
        )
    if description.get("version") != _VERSION:
        raise UserError(f"{path} was written by another version of mas-embed, and cannot be read by this one")
    if not isinstance(numbers, dict):
        raise UserError(f"{path} is damaged: it does not describe the state of a method")
    try:
        method.load_state_dict(unflatten_state(tensors | numbers))
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from None
