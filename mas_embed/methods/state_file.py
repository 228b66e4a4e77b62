"""What a method knows, in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from mas_embed.errors import UserError
from mas_embed.methods.base import Method
from mas_embed.runtime.state_file import read_states, write_states

_KIND, _VERSION = "method", 1


def save_method(path: str | os.PathLike[str], method: Method) -> None:
    """Writes the state of a method as a safetensors file, without pickle. An earlier file is replaced only by a complete one.

    `save_model` writes the model, too.

    Raises:
        UserError: the file cannot be written.
        RunError: the disk is full.
    """
    write_states(Path(path), method.state_dict(), kind=_KIND, version=_VERSION)


def load_method(path: str | os.PathLike[str], method: Method) -> None:
    """Takes a method back to the state in a file of `save_method`.

    The model must have the weights that it had when the state was saved, see `Method.load_state_dict`.

    Raises:
        UserError: the file is missing, damaged or no such file; or the state is of another method, or of other weights.
    """
    state, _ = read_states(Path(path), kind=_KIND, version=_VERSION, is_of="the state of a method")
    try:
        method.load_state_dict(state)
    except UserError as error:
        raise UserError(f"{path} cannot be loaded: {error}") from None
