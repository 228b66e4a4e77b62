"""What a config trains, and who is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mas_embed.config import Config, MethodSection, candidates_of
from mas_embed.evaluation import Candidate, RunRecord
from mas_embed.experiment.run_directory import folder_name
from mas_embed.training import Callback


@dataclass(frozen=True)
class Run:
    """One method with one seed of a run directory."""

    method: MethodSection
    seed: int

    @property
    def folder(self) -> str:
        """Of the run, inside the run directory."""
        return f"{folder_name(self.method.title)}/seed{self.seed}"

    @property
    def name(self) -> str:
        """For people to read."""
        return f"{self.method.title} seed {self.seed}"


class ExperimentCallback(Callback):
    """A callback with further methods, which are called between the trainings of an experiment.

    With several jobs, trainings run in other processes. `on_epoch_end` is then called for the epochs of runs, not of candidates,
    shortly after they were logged; a callback that needs steps, splits or the result of a training is refused.
    """

    def on_run_recorded(self, record: RunRecord) -> None:
        """Called when a method and seed has ended and its results are written."""

    def on_run_skipped(self, run: Run) -> None:
        """Called for a method and seed whose results were there already."""

    def on_run_failed(self, run: Run, reason: str) -> None:
        """Called when a method and seed has failed; the others are still trained."""

    def on_candidate_end(self, method: str, candidate: Candidate) -> None:
        """Called when a candidate for the options of a method was tried."""


def runs_of(config: Config) -> Iterator[Run]:
    """Every method and seed, in the order in which they are trained: seed by seed, so that a table fills evenly."""
    for seed in config.seeds:
        for method in config.methods:
            yield Run(method, seed)


def num_trainings(config: Config) -> int:
    """Of all methods and seeds, and of all candidates of options that are chosen."""
    selections = [method.select for method in config.methods if method.select is not None]
    searched = sum(len(candidates_of(select.options)) * len(select.seeds) for select in selections)
    return searched + sum(1 for _ in runs_of(config))


def name_of_candidate(method: str, options: dict[str, object]) -> str:
    """The name of the method in the trainings of a candidate."""
    return f"{method} {options}"
