"""The directory of a run: made, resumed or replaced, and never overwritten unasked."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mas_embed.config import resolve_config
from mas_embed.data import LearnedSplits
from mas_embed.errors import UserError
from mas_embed.evaluation import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    ITEMS_FILE,
    RECORDING_FILES,
    RESULTS_FILE,
    Results,
    read_results,
)
from mas_embed.report import REPORT_FILES
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.environment import describe_environment
from mas_embed.runtime.output_folder import (
    MARK_FILE,
    check_files,
    is_marked,
    locked,
    mark_folder,
    read_mark,
    remove_temporary_files,
)
from mas_embed.runtime.reading import read_json, read_text
from mas_embed.runtime.text import printable, shortened
from mas_embed.runtime.yaml_text import parse_yaml
from mas_embed.training import lock_of_checkpoint, previous_checkpoint

ERROR_FILE = "error.log"
FILES = (CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE, ITEMS_FILE, *REPORT_FILES, ERROR_FILE)

LOG_FILE, CHECKPOINT_FILE, MODEL_FILE = "log.jsonl", "checkpoint.safetensors", "model.safetensors"
LOG_FILES = (LOG_FILE, "steps.jsonl")
CHECKPOINT_FILES = (CHECKPOINT_FILE, previous_checkpoint(Path(CHECKPOINT_FILE)).name)
FILES_OF_A_TRAINING = (
    *LOG_FILES,
    *CHECKPOINT_FILES,
    MODEL_FILE,
    lock_of_checkpoint(Path(CHECKPOINT_FILE)).name,
    *RECORDING_FILES,
)

# Keys of a config that change no result, so that a run may be resumed with other values, as on another machine
CHANGEABLE_KEYS = (
    "training.num_workers",
    "training.checkpoint_every.minutes",
    "training.checkpoint_every.steps",
    "report.thumbnails",
)

# Keys of a config that say which splits there are, and may differ where splits are appended
SPLIT_KEYS = ("data.splits", "data.num_splits", "data.path", "data.root")

LONGEST_VALUE = 60  # in a message, in characters
_ABSENT = object()
LONGEST_NAME = 100  # of a folder, in bytes; file systems accept 255


@dataclass(frozen=True)
class RunDirectory:
    """A run directory as it is to be written.

    Attributes:
        path: of the directory.
        config_yaml: the resolved config.
        fresh: the results before anything has run.
        folders: of the trainings, inside the directory: "mas/seed0".
        learned: what is remembered of the splits, so that others can be appended when their data is gone.
        joined: the titles of methods that train on all splits at once.
        data: by name of a split the fingerprint of its data, and by key of the config that of what it names; None where files
            are missing.
        resume: go on with a run of the same config.
        overwrite: remove the run that is there.
        command: the command line that started the run; None for one that Python code started.
    """

    path: Path
    config_yaml: str
    fresh: Results
    folders: Sequence[str]
    data: Mapping[str, str | None]
    learned: LearnedSplits
    joined: Collection[str] = ()
    resume: bool = False
    overwrite: bool = False
    command: str | None = None


def folder_name(title: str) -> str:
    """The name of a method's folder: its title, unless that is no good name of a folder.

    >>> folder_name("mas, strength 3"), folder_name("results.json")
    ('mas, strength 3', 'results.json-7c39d6b0')
    """
    safe = re.sub(r"[^\w .()=,+-]", "_", title)
    safe = safe.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore").rstrip(" .")
    if safe == title and title not in FILES:
        return title
    return f"{safe}-{hashlib.sha256(title.encode(errors='surrogatepass')).hexdigest()[:8]}"


def check_run_directory(directory: RunDirectory) -> None:
    """Raises `UserError` for a directory that `open_run_directory` would refuse; writes nothing.

    Raises:
        UserError: there is a run and neither `resume` nor `overwrite`, or one of another config or of other data; it holds
            files that no run wrote; a part of it is a link.
    """
    path = directory.path
    if directory.resume and directory.overwrite:
        raise UserError("--resume keeps what is there and --overwrite replaces it; give one of them")
    if not _is_ours(path):
        check_files(path, _all_files(directory.folders), is_ours=False)
        return
    check_files(path, _all_files([*_known_folders(path), *directory.folders]), is_ours=True)
    if not _holds_a_run(path) or directory.overwrite:
        return
    if not directory.resume:
        raise UserError(
            f"{path} holds a run already: pass --resume to go on with it, --overwrite to replace it, or another --out"
        )
    known = _known_splits(path)
    has_other_splits = known is not None and known != directory.fresh.splits
    _check_config(path / CONFIG_FILE, directory.config_yaml, has_other_splits=has_other_splits)
    if known is not None and directory.fresh.splits[: len(known)] != known:
        raise UserError(
            f"{path} holds a run over the splits {_listed(known)}, but those of this config are "
            f"{_listed(directory.fresh.splits)}; with --resume, splits can only be appended to those of the run"
        )
    _check_data(path, directory.data, directory.fresh.splits)


@contextmanager
def open_run_directory(directory: RunDirectory) -> Iterator[Results]:
    """Makes the directory, or takes it over, and keeps other processes out for the body of the `with` statement.

    Yields:
        The results that are there already, or a copy of `fresh`.

    Raises:
        UserError: as `check_run_directory`; another process is running there; the directory cannot be written.
        RunError: the disk is full.
    """
    check_run_directory(directory)
    if not _is_ours(directory.path):
        _mark(directory)
    with locked(directory.path):
        check_run_directory(directory)  # another process may have begun, and ended, meanwhile
        yield _take_over(directory)


def learned_splits(path: Path) -> LearnedSplits | None:
    """What the directory of a run remembers of its splits; None where there is no run, or one of an earlier version.

    Raises:
        UserError: what it remembers is damaged.
    """
    stored = (read_mark(path) or {}).get("learned")
    return None if stored is None else LearnedSplits.from_json(stored, source=str(path / MARK_FILE))


def _known_splits(path: Path) -> list[str] | None:
    """The names of the splits of the run in a directory; None where it is not known."""
    learned = learned_splits(path)
    if learned is not None:
        return learned.names
    return read_results(path).splits if (path / RESULTS_FILE).exists() else None


def _listed(names: Sequence[str]) -> str:
    return shortened(printable(", ".join(names)), 2 * LONGEST_VALUE)


def write_into_run_directory(path: Path, name: str, content: str) -> Path | None:
    """Writes one of `FILES` if the directory is one of a run; returns its path, or None if nothing was written."""
    if not is_marked(path):
        return None
    check_files(path, [name], is_ours=True)
    write_file(path / name, content)
    return path / name


def _take_over(directory: RunDirectory) -> Results:
    path, fresh = directory.path, directory.fresh
    if directory.overwrite:
        _remove_run(path, [*_known_folders(path), *directory.folders])
    remove_temporary_files(path)
    for folder in directory.folders:
        remove_temporary_files(path / folder)
    if not _holds_a_run(path) or not is_marked(path):
        _mark(directory)
    write_file(path / CONFIG_FILE, directory.config_yaml)
    if (
        _known_splits(path) != fresh.splits
    ):  # after the config, so that a run that is killed in between is resumed likewise
        _mark(directory, before=read_mark(path) or {})
    if (path / ENVIRONMENT_FILE).exists():
        _warn_of_other_threads(path / ENVIRONMENT_FILE)
    else:
        environment = describe_environment() | ({"command": directory.command} if directory.command else {})
        write_file(path / ENVIRONMENT_FILE, json.dumps(environment, indent=1) + "\n")
    if not (path / RESULTS_FILE).exists():
        return fresh.model_copy(deep=True)
    results = read_results(path)
    is_prefix = fresh.splits[: len(results.splits)] == results.splits
    if not is_prefix or any(getattr(results, key) != getattr(fresh, key) for key in ("name", "primary_metric")):
        raise UserError(f"{path / RESULTS_FILE} is not of this config; start anew with --overwrite")
    for title, selection in results.selections.items():
        if selection.candidates and selection.chosen is None and results.splits != fresh.splits:
            raise UserError(
                f"the options of '{title}' are being chosen on the splits {_listed(results.splits)}; resume the run with these "
                "before you append others"
            )
    return results.extended(fresh.splits, joined=directory.joined)


def _warn_of_other_threads(environment: Path) -> None:
    """Warns if a run that is resumed began with another number of threads."""
    try:
        before = read_json(environment, "the environment").get("threads")
    except (UserError, AttributeError):
        return
    if before not in (None, now := torch.get_num_threads()):
        warnings.warn(
            f"the run in {environment.parent} began with {shortened(repr(before), LONGEST_VALUE)} threads and goes on with "
            f"{now}, so its scores may differ in the last digits from those of a run that is not interrupted; "
            "OMP_NUM_THREADS sets the number",
            stacklevel=2,
        )


def _mark(directory: RunDirectory, *, before: Mapping[str, Any] | None = None) -> None:
    """Marks the directory, and notes its trainings and its data; with what was noted before if splits are appended."""
    folders, data = list(directory.folders), dict(directory.data)
    if before is not None:
        folders = list(dict.fromkeys([*_known_folders(directory.path), *folders]))
        known = dict(before.get("data") or {})
        data = known | {name: value for name, value in data.items() if value is not None or name not in known}
    mark_folder(directory.path, {"folders": folders, "data": data, "learned": directory.learned.as_json()})


def _all_files(folders: Sequence[str]) -> list[str]:
    return [*FILES, *(f"{folder}/{name}" for folder in folders for name in FILES_OF_A_TRAINING)]


def _is_ours(path: Path) -> bool:
    """Whether the directory is marked, or holds results that an earlier version wrote, which made no mark."""
    return is_marked(path) or bool(_unmarked_results(path))


def _unmarked_results(path: Path) -> Results | None:
    try:
        return read_results(path)
    except UserError:
        return None


def _known_folders(path: Path) -> list[str]:
    """The folders of the trainings that the directory holds."""
    if is_marked(path):
        folders = (read_mark(path) or {}).get("folders")
        return [folder for folder in folders if _is_folder_name(folder)] if isinstance(folders, list) else []
    results = _unmarked_results(path)
    return [f"{folder_name(run.method)}/seed{run.seed}" for run in results.runs] if results else []


def _is_folder_name(folder: object) -> bool:
    """Whether it names the folder of a training, which leads nowhere else."""
    return isinstance(folder, str) and re.fullmatch(r"[\w .()=,+-]+/seed\d+", folder) is not None and folder[0] != "."


def _holds_a_run(path: Path) -> bool:
    files = [*FILES, *(f"{folder}/{name}" for folder in _known_folders(path) for name in CHECKPOINT_FILES)]
    return any((path / name).exists() for name in files)


def _check_config(path: Path, config_yaml: str, *, has_other_splits: bool = False) -> None:
    """Raises `UserError` for a run of another config; one with other splits may name them, and leave out methods."""
    if not path.exists():
        raise UserError(f"{path} is gone, so it is not known what was trained there; start anew with --overwrite")
    text = _with_present_defaults(read_text(path, "the config"))
    if text == config_yaml:
        return
    try:
        was, now = (_leaves(parse_yaml(one, str(path))) for one in (text, config_yaml))
    except UserError:
        was, now = {}, {}
    keys = [key for key in {**was, **now} if was.get(key, _ABSENT) != now.get(key, _ABSENT)]
    refused = [key for key in keys if key not in CHANGEABLE_KEYS]
    if has_other_splits:
        present = {key.split(".")[1] for key in now if key.startswith("methods.")}
        refused = [key for key in refused if not _names_splits(key) and not _is_left_out(key, present)]
    if keys and not refused:
        return
    differing = [f"{key}: {_shown(was, key)} there, {_shown(now, key)} here" for key in refused]
    raise UserError(
        f"{path.parent} holds a run of another config, which this one cannot resume ({printable('; '.join(differing))}); give "
        f"the old values, or another --out"
        if differing
        else f"{path.parent} holds a run of another config, which this one cannot resume; compare {path}"
    )


def _with_present_defaults(config_yaml: str) -> str:
    """The config of a run, with the defaults of options that did not exist when it was written."""
    try:
        return resolve_config(parse_yaml(config_yaml, CONFIG_FILE)).to_yaml()
    except UserError:  # one that this version does not accept, which is compared as it is
        return config_yaml


def _names_splits(key: str) -> bool:
    """Whether a key of a config says which splits there are, and where."""
    return any(key == one or key.startswith(f"{one}.") for one in SPLIT_KEYS)


def _is_left_out(key: str, present: Set[str]) -> bool:
    """Whether a key is of a method that a config no longer has."""
    section, _, rest = key.partition(".")
    return section == "methods" and rest.split(".")[0] not in present


def _shown(leaves: Mapping[str, object], key: str) -> str:
    return shortened(repr(leaves[key]), LONGEST_VALUE) if key in leaves else "nothing"


def _leaves(value: object, path: str = "") -> dict[str, object]:
    """The values of a config by their path of keys; components in a list by their label or name."""
    if isinstance(value, dict):
        pairs = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        names = [inner.get("label", inner.get("name")) if isinstance(inner, dict) else inner for inner in value]
        pairs = [(f"{path}.{name}", inner) for name, inner in zip(names, value, strict=True)]
    else:
        return {path: value}
    return {key: leaf for inner_path, inner in pairs for key, leaf in _leaves(inner, inner_path).items()}


def _check_data(path: Path, data: Mapping[str, str | None], splits: Sequence[str]) -> None:
    mark = read_mark(path)
    stored = mark.get("data", {}) if mark is not None else None
    if not isinstance(stored, dict):
        raise UserError(
            f"{path / MARK_FILE} is damaged, so it is not known what data was trained on; start anew with --overwrite"
        )
    for name, fingerprint in data.items():
        if fingerprint is not None and stored.get(name) not in (None, fingerprint):
            what = f"the data of split '{name}'" if name in splits else f"the content of {name}"
            raise UserError(
                f"{what} has changed since the run in {path} began; bring the old data back, or start "
                "anew with --overwrite"
            )


def _remove_run(path: Path, folders: Sequence[str]) -> None:
    """Removes the files that a run wrote, and nothing else."""
    for folder in folders:
        inside = path / folder
        if inside.is_dir():
            remove_temporary_files(inside)
            for name in FILES_OF_A_TRAINING:
                (inside / name).unlink(missing_ok=True)
            for emptied in (inside, inside.parent):
                if not any(emptied.iterdir()):
                    emptied.rmdir()
    for name in FILES:
        (path / name).unlink(missing_ok=True)
