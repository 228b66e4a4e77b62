"""What an experiment has found so far, as it is written down and told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from mas_embed.config import Config, MethodSection, candidates_of
from mas_embed.errors import RunError
from mas_embed.evaluation import Candidate, Results, RunRecord, Selection
from mas_embed.experiment.runs import ExperimentCallback, Run, runs_of
from mas_embed.experiment.search import select_options
from mas_embed.runtime.distributed import on_first
from mas_embed.training import Callback


class Journal:
    """Takes down how trainings end: writes the results, tells the listeners, and collects failures.

    Args:
        config: of the experiment.
        results: that are completed.
        out: the run directory.
        callbacks: of the caller; every `ExperimentCallback` among them is told.
    """

    def __init__(self, config: Config, results: Results, out: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.config, self.results, self.out = config, results, out
        self.listeners = [callback for callback in callbacks if isinstance(callback, ExperimentCallback)]
        self.failures: list[str] = []
        self.told = threading.Lock()  # one at a time: epochs are told by another thread

    def missing(self, config: Config) -> list[Run]:
        """The runs of a config that have no results yet; the listeners are told of the others."""
        # One that has learned fewer splits goes on with those that were appended
        done = {(record.method, record.seed) for record in self.results.runs if record.num_learned is None}
        runs = list(runs_of(config))
        for run in runs:
            if (run.method.title, run.seed) in done:
                self.tell(methodcaller("on_run_skipped", run))
        return [run for run in runs if (run.method.title, run.seed) not in done]

    def record(self, record: RunRecord) -> None:
        """Takes down a run that has ended."""
        order = {(run.method.title, run.seed): index for index, run in enumerate(runs_of(self.config))}
        others = [one for one in self.results.runs if (one.method, one.seed) != (record.method, record.seed)]
        self.results.runs[:] = [*others, record]
        # Whichever has ended first; those of methods that were left out of the config come last
        self.results.runs.sort(key=lambda one: order.get((one.method, one.seed), len(order)))
        on_first(partial(self.results.write, self.out))
        self.tell(methodcaller("on_run_recorded", record))

    def fail(self, run: Run, reason: str) -> None:
        """Takes down a run that has failed."""
        self.failures.append(reason)
        self.tell(methodcaller("on_run_failed", run, reason))

    def selection(self, method: MethodSection) -> Selection:
        """What is known of the choice of a method's options."""
        return self.results.selections.setdefault(method.title, Selection())

    def untried(self, method: MethodSection) -> list[dict[str, Any]]:
        """The candidates of a method that were not tried yet."""
        assert method.select is not None
        tried = [candidate.options for candidate in self.selection(method).candidates]
        return [options for options in candidates_of(method.select.options) if options not in tried]

    def record_candidate(self, method: MethodSection, candidate: Candidate) -> None:
        """Takes down a candidate that was tried."""
        assert method.select is not None
        order = candidates_of(method.select.options)
        candidates = self.selection(method).candidates
        candidates.append(candidate)
        candidates.sort(key=lambda one: order.index(one.options))
        on_first(partial(self.results.write, self.out))
        self.tell(methodcaller("on_candidate_end", method.title, candidate))

    def selected(self, method: MethodSection) -> MethodSection | None:
        """A method with the options of its best candidate; None, and a failure, if every candidate has failed."""
        try:
            return select_options(self.config, method, self.selection(method))
        except RunError as error:
            self.failures.append(str(error))
            return None

    def tell(self, news: Callable[[ExperimentCallback], None]) -> None:
        """Calls a function with every listener."""
        with self.told:
            for listener in self.listeners:
                news(listener)
