"""States in files: of a method alone, or of a model with its method. One shape of description, checked in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.checks import shown
from mas_embed.runtime.nested_state import flatten_state, unflatten_state


def write_states(
    path: Path, states: Mapping[str, Any], *, kind: str, version: int, about: Mapping[str, Any] | None = None
) -> None:
    """Writes nested states as one safetensors file, without pickle. An earlier file is replaced only by a complete one.

    Args:
        path: of the file.
        states: nested mappings of tensors, and of numbers, strings and what else is JSON.
        kind: of the file, as messages name it.
        version: of its layout.
        about: further JSON that is stored with them.

    Raises:
        UserError: a state holds something else, or the file cannot be written.
        RunError: the disk is full.
    """
    tensors, numbers = flatten_state(states)
    for name, value in numbers.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path.name} cannot hold '{name}' of the state, which is neither a tensor nor JSON: {reason_of(error)}"
            ) from None
    write_tensors(path, tensors, {"kind": kind, "version": version, "numbers": numbers, **(about or {})})


def read_states(path: Path, *, kind: str, version: int, is_of: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states in a file of `write_states`, and its description.

    Args:
        path: of the file.
        kind: that it must be of.
        version: that it must have.
        is_of: what such a file is, for messages: "the state of a method".

    Raises:
        UserError: the file is missing, is damaged, is of another kind, or was written by another version.
    """
    tensors, description = read_tensors(path)
    if description.get("kind") != kind:
        raise UserError(f"{path} is not {is_of} but holds {shown(description.get('kind'))}; name another file")
    found = description.get("version")
    if found != version:
        is_newer = isinstance(found, int) and found > version
        raise UserError(
            f"{path} was written by {'a newer' if is_newer else 'another'} version of mas-embed, and cannot be read by this one"
        )
    numbers = description.get("numbers")
    if not isinstance(numbers, dict):
        raise UserError(f"{path} is damaged: it does not describe {is_of}")
    return unflatten_state(tensors | numbers), description
