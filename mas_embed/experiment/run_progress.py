"""An experiment in the terminal, as it goes."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from mas_embed.config import Config
from mas_embed.evaluation import Candidate, RunRecord
from mas_embed.experiment.runs import ExperimentCallback, Run, name_of_candidate, num_trainings
from mas_embed.training import EpochEnd, ProgressBar


class RunProgress(ExperimentCallback):
    """Shows a bar for a whole experiment, and a line for every run that has ended. A context manager.

    Args:
        config: that is trained.
        console: of `rich`.
    """

    def __init__(self, config: Config, console: Any) -> None:
        self._bar = ProgressBar(num_runs=num_trainings(config), console=console)
        self._primary_metric = config.evaluation.primary_metric

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, traceback)

    def on_epoch_end(self, event: EpochEnd) -> None:
        self._bar.on_epoch_end(event)

    def on_candidate_end(self, method: str, candidate: Candidate) -> None:
        for seed in candidate.seeds:
            self._bar.finish(name_of_candidate(method, candidate.options), seed)
        options = ", ".join(f"{name}={value}" for name, value in candidate.options.items())
        outcome = f"failed: {candidate.error}" if candidate.mean is None else f"on validation {candidate.mean:.3f}"
        self._bar.print(f"{method:<16} {options}  {outcome}  ({candidate.seconds:.0f} s)")

    def on_run_recorded(self, record: RunRecord) -> None:
        self._bar.finish(record.method, record.seed)
        measures = record.measures[self._primary_metric]
        values = [
            f"{name.replace('_', ' ')} {measures[name]:.3f}"
            for name in ("final_average", "forgetting")
            if measures[name] is not None
        ]
        seconds = sum(record.seconds.values())
        self._bar.print(f"{record.method:<16} seed {record.seed}  {'  '.join(values)}  ({seconds:.0f} s)")

    def on_run_skipped(self, run: Run) -> None:
        self._bar.finish(run.method.title, run.seed)
        self._bar.print(f"{run.method.title:<16} seed {run.seed}  done already")

    def on_run_failed(self, run: Run, reason: str) -> None:
        self._bar.finish(run.method.title, run.seed)
        self._bar.print(f"{run.method.title:<16} seed {run.seed}  failed")
