"""What a run directory holds beside its results: the config, the environment, logs and recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mas_embed.errors import UserError
from mas_embed.evaluation import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    Items,
    Recording,
    Results,
    read_items,
    read_recordings,
)
from mas_embed.runtime.reading import read_text
from mas_embed.runtime.yaml_text import parse_yaml

LOG_FILE = "log.jsonl"
MOST_LOGS = 2000


class LogLine(BaseModel):
    """A line of a training's log: an epoch that has ended, or a split."""

    event: str
    split: str
    split_index: int
    num_splits: int
    epoch: int = 0
    loss: float | None = None
    penalty: float | None = None
    num_batches: int = 1
    scores: dict[str, list[float | None]] = {}


@dataclass(frozen=True)
class TrainingLog:
    """The log of one training.

    Attributes:
        method: its title.
        seed: of the training, as its folder says it.
        epochs: a line for each that has ended.
        splits: a line for each that was learned and evaluated.
    """

    method: str
    seed: str
    epochs: list[LogLine]
    splits: list[LogLine]

    @property
    def num_splits(self) -> int:
        """Of the sequence; 0 for an empty log."""
        return max((line.num_splits for line in (*self.epochs, *self.splits)), default=0)


@dataclass(frozen=True)
class RunFiles:
    """The files of one run directory beside its results.

    Attributes:
        config: the text of the resolved config; "" where there is none.
        environment: the text about the machine and the versions; "" where there is none.
        logs: of the trainings, also of those that are not finished.
        recordings: of the trainings, also of those that are not finished.
        items: pictures, texts and names of what the recordings name; None where there are none.
        changes: the part of the config that is not the default; "" if it is not known.
        mistakes: a sentence for each file that could not be read.
        titles: by the title of a method in the directory the one that the page shows, where that is another.
    """

    config: str = ""
    environment: str = ""
    logs: list[TrainingLog] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    items: Items | None = None
    changes: str = ""
    mistakes: list[str] = field(default_factory=list)
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The content of the config; empty for one that is damaged."""
        try:
            content = parse_yaml(self.config, "the config")
        except UserError:
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def machine(self) -> dict[str, Any]:
        """The content of the environment; empty for one that is damaged."""
        try:
            content = json.loads(self.environment)
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def methods(self) -> list[tuple[str, str]]:
        """The title on the page and the name of every method of the config."""
        listed = self.settings.get("methods")
        found = []
        for method in listed if isinstance(listed, list) else []:
            if isinstance(method, dict) and isinstance(method.get("name"), str):
                title = str(method.get("label") or method["name"])
                found.append((self.titles.get(title, title), method["name"]))
        return found

    @property
    def num_trainings(self) -> int:
        """Of all methods and seeds of the config."""
        seeds = self.settings.get("seeds")
        return len(self.methods) * (len(seeds) if isinstance(seeds, list) else 1)


def read_run_files(
    folder: Path,
    results: Results | None,
    titles: Mapping[str, str],
    changes_of: Callable[[str], str | None] = lambda config: None,
) -> RunFiles:
    """Reads what is there.

    Args:
        folder: the run directory.
        results: that it holds.
        titles: see `RunFiles`.
        changes_of: gives the part of a config that is not the default, or None if it is not known.
    """
    mistakes: list[str] = []
    logs = []
    for path in sorted(folder.glob(f"*/seed*/{LOG_FILE}"))[:MOST_LOGS]:
        method = _title_of(path.parent, folder, results)
        try:
            lines = list(_log_lines(path))
        except UserError as error:
            mistakes.append(str(error))
            continue
        epochs, splits = ([line for line in lines if line.event == event] for event in ("epoch", "split"))
        logs.append(TrainingLog(titles.get(method, method), path.parent.name.removeprefix("seed"), epochs, splits))
    recordings, items = [], None
    try:
        recordings = [replace(one, method=titles.get(one.method, one.method)) for one in read_recordings(folder)]
        items = read_items(folder)
    except UserError as error:
        mistakes.append(str(error))
    config, environment = _text(folder / CONFIG_FILE), _text(folder / ENVIRONMENT_FILE)
    return RunFiles(config, environment, logs, recordings, items, changes_of(config) or "", mistakes, titles)


def _title_of(training: Path, folder: Path, results: Results | None) -> str:
    """The title of the method whose training has a folder."""
    name = str(training.relative_to(folder))
    recorded = {run.folder: run.method for run in results.runs} if results else {}
    return recorded.get(name, training.parent.name)


def _log_lines(path: Path) -> Iterable[LogLine]:
    """The lines of a log; the last may be cut, because it is being written.

    Raises:
        UserError: another line is damaged.
    """
    lines = read_text(path, "the log").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield LogLine.model_validate_json(line)
        except ValidationError:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is damaged, so the log is left out") from None


def _text(path: Path) -> str:
    return read_text(path, "the file") if path.exists() else ""
