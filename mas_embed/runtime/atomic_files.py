"""Atomic file writes: a file is written under a temporary name in the same folder, flushed to disk, and then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.runtime.reading import check_regular_file, read_errors_explained
from mas_embed.runtime.text import printable

METADATA_KEY = "mas_embed"
CHECKSUM_KEY = "mas_embed_checksum"
NAMES_KEY = "mas_embed_names"  # in their order, which the format does not keep: sums over a mapping depend on it
TEMPORARY_FILES = ".mas-embed-*.tmp"  # what a killed process may leave in a folder

# The disk is full or broken: nothing that the user gave is wrong
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def atomic_file(path: Path, *, keep_as: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the body ends, unless the body raises.

    Args:
        path: of the file.
        keep_as: the name that a file which is at `path` already gets, in the same folder; None to replace it.

    Raises:
        UserError: the folder of the file does not exist or cannot be written, or the name is not possible there.
        RunError: the disk is full.
    """
    with write_errors_explained(path):
        if not path.name:
            raise UserError(f"'{path}' names no file; give the path of a file")
        if not path.parent.is_dir():
            raise UserError(f"the folder {path.parent} does not exist; make it first, to write {path.name} there")
        temporary = path.with_name(f".mas-embed-{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_as is not None and path.exists():
                path.replace(keep_as)
            temporary.replace(path)
            _flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes the names of files in a folder survive a power failure, where the system has folders that can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Raises the errors of the operating system as a sentence that names the path.

    Raises:
        UserError: the path cannot be written.
        RunError: the disk is full, or fails.
    """
    if "\0" in str(path):
        raise UserError(f"'{printable(str(path))}' is no name of a file")
    try:
        yield
    except OSError as error:
        kind = RunError if error.errno in _DISK_ERRORS else UserError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error


def is_of_the_disk(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, says that the disk is full or broken."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return True
        error = error.__cause__
    return False


def write_file(path: Path, content: bytes | str, *, keep_as: Path | None = None) -> None:
    """Writes a file atomically: after a crash the file holds either the old content or the new content in full.

    Args:
        path: of the file.
        content: of the file.
        keep_as: see `atomic_file`.

    Raises:
        UserError, RunError: as `atomic_file`.
    """
    with atomic_file(path, keep_as=keep_as) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], *, keep_as: Path | None = None
) -> None:
    """Writes tensors and a JSON description with a checksum of both, atomically, as one safetensors file, without pickle.

    `keep_as` is the name that an earlier file gets, see `atomic_file`.
    """
    on_cpu = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    metadata = {METADATA_KEY: text, CHECKSUM_KEY: _checksum(on_cpu, text), NAMES_KEY: json.dumps(list(on_cpu))}
    content = safetensors.torch.save(on_cpu, metadata)
    write_file(path, content, keep_as=keep_as)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, in their order, and the description in a file that `write_tensors` wrote.

    Files of earlier versions have no checksum or no order, and are read without.

    Raises:
        UserError: the file does not exist, is not a safetensors file, is damaged, or was written by another program.
    """
    check_regular_file(path, "the file")
    try:
        with read_errors_explained(path, "the file"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot read {path} as a safetensors file: {reason_of(error)}") from None
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} is a safetensors file, but not one that mas-embed wrote")
    text = metadata[METADATA_KEY]
    is_known = metadata.keys() <= {
        METADATA_KEY,
        CHECKSUM_KEY,
        NAMES_KEY,
    }  # else the name of the checksum may be what is damaged
    if not is_known or metadata.get(CHECKSUM_KEY) not in (None, _checksum(tensors, text)):
        raise UserError(f"{path} is damaged: its content does not have the checksum that was written with it")
    try:
        description = json.loads(text)
        tensors = {name: tensors[name] for name in json.loads(metadata.get(NAMES_KEY, "null")) or tensors}
    except (ValueError, RecursionError, KeyError, TypeError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"{path} is damaged: its description is not a JSON object, or not of its tensors")
    return tensors, description


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of names, types, shapes and bytes of tensors, and of a text."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode(errors="surrogatepass"))
        if tensor.numel():  # an empty one may have a stride of 0, of which there is no view
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
