"""The trainings of an experiment side by side: what waits for what, and how their results come together."""

from __future__ import annotations

import json
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from mas_embed.config import Config, MethodSection
from mas_embed.errors import RunError, UserError
from mas_embed.evaluation import RunRecord
from mas_embed.experiment.jobs import Task, run_tasks, workers_ended
from mas_embed.experiment.journal import Journal
from mas_embed.experiment.run_directory import ERROR_FILE, LOG_FILE, write_into_run_directory
from mas_embed.experiment.runs import ExperimentCallback, Run, name_of_candidate, runs_of
from mas_embed.experiment.search import Trial, as_candidate
from mas_embed.experiment.stopping import stored_before_the_end
from mas_embed.experiment.worker import Failure, Outcome, Surroundings
from mas_embed.training import Callback, EpochEnd

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Workers:
    """Who trains, and with what functions.

    Attributes:
        jobs: trainings that run at once.
        surroundings: of each of them.
        train: `(config, call, run, out, resume) -> RunRecord`.
        score: `(config, call, method, options, seed) -> float`, of a candidate.
        call: a text of which functions know what they may remember from their last task.
    """

    jobs: int
    surroundings: Surroundings
    train: Callable[..., RunRecord]
    score: Callable[..., float]
    call: str = field(default_factory=lambda: uuid.uuid4().hex)


def check_callbacks(callbacks: Sequence[Callback], jobs: int) -> None:
    """Raises `UserError` for callbacks that cannot be informed of trainings in other processes."""
    for callback in callbacks:
        kind = type(callback)
        hooks = [name for name in ("on_step_end", "on_split_end", "on_run_end") if _overrides(kind, name)]
        if hooks or not isinstance(callback, ExperimentCallback):
            raise UserError(
                f"with jobs={jobs} the trainings run in other processes, where the callback {kind.__name__} cannot be informed; "
                "name it in the config (callbacks: [...]), so that each process makes its own, or pass jobs=1"
            )


def _overrides(kind: type[Callback], name: str) -> bool:
    return getattr(kind, name) is not getattr(Callback, name)


def train_side_by_side(config: Config, journal: Journal, *, resume: bool, workers: Workers) -> None:
    """Trains what the results lack; a run that fails does not stop the others.

    Methods whose options are chosen are trained when all candidates were tried; the runs of the other methods do not wait.

    Raises:
        RunError: the disk is full, or a worker has died.
    """
    selected = [method for method in config.methods if method.select is not None]
    at_once = config.model_copy(update={"methods": tuple(one for one in config.methods if one.select is None)})
    with workers_ended(), _epochs_reported(journal), stored_before_the_end() as stopping:
        workers = replace(workers, surroundings=replace(workers.surroundings, stopping=stopping))
        tasks = [task for method in selected for task in _candidate_tasks(config, method, journal, workers)]
        _run_all([*tasks, *_run_tasks(at_once, journal, resume, workers)], workers)
        chosen = [method for method in map(journal.selected, selected) if method is not None]
        _run_all(_run_tasks(config.model_copy(update={"methods": tuple(chosen)}), journal, resume, workers), workers)


def _run_tasks(config: Config, journal: Journal, resume: bool, workers: Workers) -> list[Task]:
    """A task for every run of a config that has no results yet."""

    def end(run: Run, outcome: Outcome) -> None:
        if outcome.failure is None:
            journal.record(outcome.value)
        else:
            journal.fail(run, _sentence(run, outcome.failure, journal.out))

    return [
        Task(run.name, workers.train, (config, workers.call, run, journal.out, resume), partial(end, run))
        for run in journal.missing(config)
    ]


def _candidate_tasks(config: Config, method: MethodSection, journal: Journal, workers: Workers) -> Iterator[Task]:
    """A task for every seed of every candidate that was not tried yet; the last that ends records the candidate."""
    assert method.select is not None
    seeds = method.select.seeds
    for options in journal.untried(method):
        trials: dict[int, Trial] = {}

        def end(
            seed: int, outcome: Outcome, options: dict[str, Any] = options, trials: dict[int, Trial] = trials
        ) -> None:
            reason = None if outcome.failure is None else outcome.failure.sentence
            trials[seed] = Trial(outcome.value, reason, outcome.seconds)
            if len(trials) == len(seeds):
                candidate = as_candidate(options, seeds, [trials[seed] for seed in seeds])
                journal.record_candidate(method, candidate)

        for seed in seeds:
            name = f"{name_of_candidate(method.title, options)} seed {seed}"
            arguments = (config, workers.call, method, options, seed)
            yield Task(name, workers.score, arguments, partial(end, seed))


def _run_all(tasks: Sequence[Task], workers: Workers) -> None:
    with closing(run_tasks(tasks, jobs=workers.jobs, surroundings=workers.surroundings)) as outcomes:
        for task, outcome in outcomes:
            for text in outcome.warnings:
                warnings.warn(text, stacklevel=2)
            if outcome.failure is not None and outcome.failure.stops_others:
                raise RunError(f"{task.name}: {outcome.failure.sentence}")
            task.end(outcome)


def _sentence(run: Run, failure: Failure, out: Path) -> str:
    """What a user reads of a run that has failed; the traceback of what nobody has foreseen is written down."""
    if failure.traceback is None:
        return failure.sentence
    path = write_into_run_directory(out, ERROR_FILE, failure.traceback)
    return f"{run.name}: {failure.sentence} (traceback in {path})"


@contextmanager
def _epochs_reported(journal: Journal) -> Iterator[None]:
    """Calls `on_epoch_end` of the listeners for what is appended to the logs of runs, in the body of the `with` statement."""
    logs = [_Log(journal, run) for run in runs_of(journal.config)]
    has_ended = threading.Event()

    def report() -> None:
        while not has_ended.wait(_SECONDS_BETWEEN_LOOKS):
            for log in logs:
                log.report()

    thread = threading.Thread(target=report, daemon=True)
    if any(_overrides(type(listener), "on_epoch_end") for listener in journal.listeners):
        thread.start()
    try:
        yield
    finally:
        has_ended.set()
        if thread.is_alive():
            thread.join()


class _Log:
    """The log of a run, read as it grows."""

    def __init__(self, journal: Journal, run: Run) -> None:
        self._journal, self._run = journal, run
        self._path = journal.out / run.folder / LOG_FILE
        self._position = self._size()

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def report(self) -> None:
        """Tells the listeners of the epochs that were appended since the last call."""
        size = self._size()
        if size < self._position:  # it was begun anew
            self._position = 0
        if size == self._position:
            return
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            event = self._epoch(line)
            if event is not None:
                self._journal.tell(methodcaller("on_epoch_end", event))

    def _epoch(self, line: bytes) -> EpochEnd | None:
        """The event that a line of the log is of; None for another line, or one that another program has changed."""
        try:
            values = json.loads(line)
            if values.pop("event") != "epoch":
                return None
            epochs = self._journal.config.training.epochs
            return EpochEnd(method=self._run.method.title, seed=self._run.seed, num_epochs=epochs, **values)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
