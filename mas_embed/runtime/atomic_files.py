"""Atomic file writes: a file is written under a temporary name in the same folder, flushed to disk, and then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mas_embed.errors import UserError

METADATA_KEY = "mas_embed"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the body ends, unless the body raises.

    Raises:
        UserError: the folder of the file does not exist.
    """
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it first, to write {path.name} there")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: after a crash the file holds either the old content or the new content in full.

    Raises:
        UserError: the folder of the file does not exist.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON description atomically as one safetensors file, without pickle."""
    on_cpu = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(on_cpu, {METADATA_KEY: json.dumps(description)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description in a file that `write_tensors` wrote.

    Raises:
        UserError: the file does not exist, is not a safetensors file, or was written by another program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as a safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} is a safetensors file, but not one that mas-embed wrote")
    return tensors, json.loads(metadata[METADATA_KEY])
