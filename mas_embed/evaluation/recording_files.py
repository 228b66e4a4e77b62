"""The files of a run directory that hold what its trainings have recorded, without pickle: safetensors with a description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from mas_embed.errors import UserError
from mas_embed.evaluation.recording import (
    EmbeddingMap,
    Observations,
    RecordedClasses,
    RecordedParameters,
    RecordedQueries,
    Recording,
)
from mas_embed.runtime.atomic_files import read_tensors, write_file, write_tensors
from mas_embed.runtime.json_text import json_text
from mas_embed.runtime.reading import read_json

RECORDING_FILE = "recording.safetensors"
PARAMETERS_FILE = "parameters.safetensors"
RESOURCES_FILE = "resources.json"
RECORDING_FILES = (RECORDING_FILE, PARAMETERS_FILE, RESOURCES_FILE)
VERSION = 1

_PARTS: dict[str, type[Any]] = {"queries": RecordedQueries, "classes": RecordedClasses, "map": EmbeddingMap}


def write_recording(folder: Path, about: Recording, observations: Observations) -> None:
    """Writes what an evaluator has recorded into the folder of its training.

    Args:
        folder: of the training.
        about: whose method, seed, splits and `after` are written with it.
        observations: of the evaluator.
    """
    parts = {name: getattr(observations, name) for name in _PARTS}
    described = {"method": about.method, "seed": about.seed, "splits": about.splits, "after": about.after}
    _write(folder / RECORDING_FILE, "recording", parts, described)


def write_parameters(folder: Path, parameters: RecordedParameters) -> None:
    """Writes what is recorded of the parameters into the folder of their training."""
    _write(folder / PARAMETERS_FILE, "parameters", {"parameters": parameters}, {})


def read_parameters(folder: Path) -> RecordedParameters | None:
    """What was recorded of the parameters; None if there is no file.

    Raises:
        UserError: the file is damaged, or a newer version wrote it.
    """
    path = folder / PARAMETERS_FILE
    if not path.exists():
        return None
    tensors, texts = _read(path, "parameters")
    parameters: RecordedParameters | None = _record_of(RecordedParameters, "parameters", tensors, texts, path)
    return parameters


def write_resources(folder: Path, memory: Mapping[str, int]) -> None:
    """Writes the peak memory of a training, in bytes, into its folder."""
    write_file(folder / RESOURCES_FILE, json_text({"memory": dict(memory)}, indent=1) + "\n")


def read_recordings(run_directory: str | Path) -> list[Recording]:
    """What the trainings of a run directory have recorded, of those that have, also while the run goes on.

    They are in the order of their methods and seeds.

    Raises:
        UserError: a file is damaged, or a newer version wrote it.
    """
    paths = sorted(Path(run_directory).glob(f"*/seed*/{RECORDING_FILE}"))
    recordings = [_read_recording(path) for path in paths]
    return sorted(recordings, key=lambda one: (one.method, one.seed))


def _read_recording(path: Path) -> Recording:
    tensors, described = _read(path, "recording")
    try:
        recording = Recording(
            method=str(described["method"]),
            seed=int(described["seed"]),
            folder=f"{path.parent.parent.name}/{path.parent.name}",
            splits=[str(name) for name in described["splits"]],
            after=int(described["after"]),
        )
    except (KeyError, TypeError, ValueError):
        raise _damaged(path) from None
    parts: dict[str, Any] = {name: _record_of(kind, name, tensors, described, path) for name, kind in _PARTS.items()}
    return replace(recording, **parts, parameters=read_parameters(path.parent), memory=_read_memory(path.parent))


def _read_memory(folder: Path) -> dict[str, int]:
    path = folder / RESOURCES_FILE
    if not path.exists():
        return {}
    content = read_json(path, "the memory of a training")
    memory = content.get("memory") if isinstance(content, dict) else None
    if not isinstance(memory, dict) or not all(isinstance(value, int) for value in memory.values()):
        raise _damaged(path)
    return memory


def _write(path: Path, kind: str, parts: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Writes records by name: their arrays as tensors, everything else in the description."""
    values = {key: value for name, record in parts.items() if record is not None for key, value in _flat(name, record)}
    tensors = {key: torch.from_numpy(value) for key, value in values.items() if hasattr(value, "dtype")}
    texts = {key: value for key, value in values.items() if key not in tensors}
    write_tensors(path, tensors, {"kind": kind, "version": VERSION, **described, **texts})


def _flat(prefix: str, record: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a record, and those of the records in it, by their names with a dot between."""
    for one in fields(record):
        value = getattr(record, one.name)
        if is_dataclass(value):
            yield from _flat(f"{prefix}.{one.name}", value)
        else:
            yield f"{prefix}.{one.name}", value


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the description of a file."""
    tensors, described = read_tensors(path)
    if described.get("kind") != kind or not isinstance(described.get("version"), int):
        raise _damaged(path)
    if described["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of mas-embed; update mas-embed to read it")
    return {name: tensor.numpy() for name, tensor in tensors.items()}, described


def _record_of(kind: type[Any], prefix: str, tensors: Mapping[str, Any], texts: Mapping[str, Any], path: Path) -> Any:
    """The record that `_write` wrote under a name; None if there is none."""
    values = {**texts, **tensors}
    if not any(key.startswith(f"{prefix}.") for key in values):
        return None
    hints = get_type_hints(kind)
    found = {}
    for one in fields(kind):
        key, hint = f"{prefix}.{one.name}", hints[one.name]
        is_record = isinstance(hint, type) and is_dataclass(hint)
        found[one.name] = _record_of(hint, key, tensors, texts, path) if is_record else values.get(key)
        if found[one.name] is None:
            raise _damaged(path)
    return kind(**found)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} does not hold what a training recorded; it is left over or damaged, so remove it")
