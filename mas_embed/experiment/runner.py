"""A whole run: every method and seed of a config, trained, evaluated and written to one directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mas_embed.config import Config, MethodSection, candidates_of, with_candidate
from mas_embed.data import Split, fingerprint_of_split
from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.evaluation import (
    RESULTS_FILE,
    Candidate,
    Results,
    RunRecord,
    Selection,
    first_mistake,
    without_details,
)
from mas_embed.experiment.build import build_callbacks, build_splits, build_training
from mas_embed.experiment.dry_run import dry_run
from mas_embed.experiment.run_directory import (
    CHECKPOINT_FILE,
    LOG_FILE,
    LOG_FILES,
    RunDirectory,
    check_run_directory,
    folder_name,
    open_run_directory,
)
from mas_embed.experiment.search import best_candidate, try_candidate
from mas_embed.experiment.start import consolidate_start, fingerprints_of_start
from mas_embed.report import write_report
from mas_embed.runtime.atomic_files import write_errors_explained
from mas_embed.runtime.distributed import check_one_process
from mas_embed.training import Callback, CheckpointEvery, EpochLog, has_checkpoint, train_sequence


@dataclass(frozen=True)
class Run:
    """One method with one seed of a run directory."""

    method: MethodSection
    seed: int

    @property
    def folder(self) -> str:
        """Of the run, inside the run directory."""
        return f"{folder_name(self.method.title)}/seed{self.seed}"


class ExperimentCallback(Callback):
    """A callback with further methods, which are called between the trainings of an experiment."""

    def on_run_recorded(self, record: RunRecord) -> None:
        """Called when a method and seed has ended and its results are written."""

    def on_run_skipped(self, run: Run) -> None:
        """Called for a method and seed whose results were there already."""

    def on_candidate_end(self, method: str, candidate: Candidate) -> None:
        """Called when a candidate for the options of a method was tried."""


def run_experiment(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Results:
    """Trains every method with every seed, and writes the run directory with its report.

    Every method of a seed starts from the same weights. Everything is tried out on one batch before anything is written, so
    that a mistake in the config leaves no trace. Results are written after every method and seed.

    Args:
        config: from `load_config`.
        out: the run directory; by default `runs/<name>`.
        resume: go on where a run of the same config stopped.
        overwrite: replace the results that the directory holds.
        callbacks: passed on to `train_sequence`; the methods of an `ExperimentCallback` are also called between trainings.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: the config cannot be trained; the directory holds results and neither `resume` nor `overwrite` is set, or
            other files, or another process is running there; there are several processes.
        RunError: training diverged, the disk is full, or the report of the finished run cannot be drawn.
    """
    check_one_process()
    if out is not None and not str(out).strip():
        raise UserError("out is empty; name a folder, or '.' for the working directory")
    out = default_directory(config) if out is None else Path(out)
    splits = build_splits(config)
    directory = RunDirectory(
        out,
        config.to_yaml(),
        Results(
            name=config.name, splits=[split.name for split in splits], primary_metric=config.evaluation.primary_metric
        ),
        folders=[run.folder for run in runs_of(config)],
        data={split.name: fingerprint_of_split(split) for split in splits} | fingerprints_of_start(config, splits),
        resume=resume,
        overwrite=overwrite,
    )
    check_run_directory(directory)
    dry_run(config, splits)
    with open_run_directory(directory) as results:
        _train_all(config, splits, results, out, resume, callbacks)
        _report(out)
    return results


def default_directory(config: Config) -> Path:
    """Where a run is written to if it is not said."""
    return Path("runs") / config.name


def _train_all(
    config: Config,
    splits: Sequence[Split],
    results: Results,
    out: Path,
    resume: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Trains what the results lack, and writes them after every training."""
    listeners = [callback for callback in callbacks if isinstance(callback, ExperimentCallback)]
    config = _with_selected_options(config, results, out, callbacks, listeners)
    done = {(record.method, record.seed) for record in results.runs}
    for run in runs_of(config):
        if (run.method.title, run.seed) in done:
            for listener in listeners:
                listener.on_run_skipped(run)
            continue
        record = _train(config, splits, run, out, resume, callbacks)
        results.runs.append(record)
        results.write(out)
        for listener in listeners:
            listener.on_run_recorded(record)


def _report(out: Path) -> None:
    """Writes the report; whatever keeps it from being drawn loses no results."""
    try:
        write_report(out)
    except Exception as error:
        raise RunError(
            f"everything is trained, and its scores are in {out / RESULTS_FILE}, but the report cannot be written: "
            f"{reason_of(error)}; `mas-embed report` tries again"
        ) from error


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


def _train(
    config: Config, splits: Sequence[Split], run: Run, out: Path, resume: bool, callbacks: Sequence[Callback]
) -> RunRecord:
    folder = out / run.folder
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    training = build_training(config, run.method, splits, seed=run.seed)
    checkpoint = folder / CHECKPOINT_FILE
    try:
        if not (resume and has_checkpoint(checkpoint)):  # a checkpoint holds what the method has stored
            for log in LOG_FILES:
                (folder / log).unlink(missing_ok=True)
            consolidate_start(config, run.method, training, splits, seed=run.seed)
        result = train_sequence(
            **vars(training),
            seed=run.seed,
            checkpoint=checkpoint,
            resume=resume,
            checkpoint_every=CheckpointEvery(**dict(config.training.checkpoint_every)),
            callbacks=[EpochLog(folder / LOG_FILE), *build_callbacks(config, folder), *callbacks],
        )
    except (RunError, UserError) as error:
        # The config was tried out before: an error now comes from the training itself
        raise RunError(f"{run.method.title} seed {run.seed}: {error}") from error
    try:
        return result.as_record(
            {
                "method": run.method.title,
                "options": run.method.options,
                "importance_data": config.importance_of(run.method),
            }
        )
    except ValidationError as error:
        mistake = first_mistake(error)
        raise RunError(
            f"{run.method.title} seed {run.seed}: what was measured cannot be recorded ({mistake})"
        ) from error


def _with_selected_options(
    config: Config,
    results: Results,
    out: Path,
    callbacks: Sequence[Callback],
    listeners: Sequence[ExperimentCallback],
) -> Config:
    """The config with the options that were selected; every candidate is written to the results as it ends."""
    chosen = []
    for method in config.methods:
        if method.select is None:
            chosen.append(method)
            continue
        selection = results.selections.setdefault(method.title, Selection())
        for options in candidates_of(method.select.options)[len(selection.candidates) :]:

            def score(options: Mapping[str, Any], seed: int, method: MethodSection = method) -> float:
                return _validation_score(config, method, options, seed, callbacks)

            candidate = try_candidate(options, method.select.seeds, score)
            selection.candidates.append(candidate)
            results.write(out)
            for listener in listeners:
                listener.on_candidate_end(method.title, candidate)
        best = best_candidate(selection.candidates, f"{method.title}: selection").options
        selection.by, selection.on, selection.chosen = method.select.by, method.select.on, best
        chosen.append(with_candidate(config, method, best))
    return config.model_copy(update={"methods": tuple(chosen)})


def _validation_score(
    config: Config, method: MethodSection, options: Mapping[str, Any], seed: int, callbacks: Sequence[Callback]
) -> float:
    """The measure of a candidate's training on the validation part, by which options are chosen."""
    assert method.select is not None
    splits = build_splits(config, held_out=method.select.on)
    # Subsets may lie in any split, so the components are built for all, whichever are trained
    training = build_training(config, with_candidate(config, method, options), splits, seed=seed)
    training.method.name = f"{method.title} {dict(options)}"
    consolidate_start(config, method, training, splits, seed=seed)
    num_splits = None if training.method.joins_splits else method.select.num_splits
    evaluator = without_details(training.evaluator)
    arguments = {**vars(training), "splits": training.splits[:num_splits], "evaluator": evaluator}
    result = train_sequence(**arguments, seed=seed, callbacks=callbacks)
    return float(getattr(result.scores[config.evaluation.primary_metric], method.select.by))
