"""A whole run: every method and seed of a config, trained, evaluated and written to one directory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from mas_embed.config import Config, MethodSection, changed_options, with_candidate
from mas_embed.data import LearnedSplits, Split, fingerprint_of_split
from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.evaluation import RESULTS_FILE, Results, RunRecord, first_mistake, without_details
from mas_embed.experiment.build import build_callbacks, build_splits, build_training
from mas_embed.experiment.dry_run import dry_run
from mas_embed.experiment.jobs import check_jobs, threads_of_a_job
from mas_embed.experiment.recording import recording_callbacks, remove_recording
from mas_embed.experiment.run_directory import (
    CHECKPOINT_FILE,
    LOG_FILE,
    LOG_FILES,
    MODEL_FILE,
    RunDirectory,
    check_run_directory,
    learned_splits,
    open_run_directory,
)
from mas_embed.experiment.runs import Run, name_of_candidate, num_trainings, runs_of
from mas_embed.experiment.saved_model import save_model
from mas_embed.experiment.search import finite_score, try_candidate
from mas_embed.experiment.shown_items import update_items
from mas_embed.experiment.side_by_side import Journal, Workers, check_callbacks, train_side_by_side
from mas_embed.experiment.start import consolidate_start, fingerprints_of_start
from mas_embed.experiment.worker import num_threads, surroundings_of_jobs
from mas_embed.methods import METHODS
from mas_embed.report import write_report
from mas_embed.runtime.atomic_files import is_of_the_disk, write_errors_explained
from mas_embed.runtime.distributed import (
    first_then_others,
    launched_processes,
    meet,
    num_processes,
    on_first,
    process_rank,
    together,
)
from mas_embed.runtime.text import printable, shortened
from mas_embed.training import (
    Callback,
    CheckpointEvery,
    EpochLog,
    has_checkpoint,
    make_accelerator,
    previous_checkpoint,
    read_last_checkpoint,
    train_sequence,
)

MOST_FAILURES = 3  # that a message tells in full


@together
def run_experiment(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    jobs: int = 1,
    imports: Sequence[str] = (),
    command: str | None = None,
) -> Results:
    """Trains every method with every seed, and writes the run directory with its report.

    Every method of a seed starts from the same weights. Everything is tried out on one batch before anything is written, so
    that a mistake in the config leaves no trace. Results are written after every method and seed. One that fails does not stop
    the others.

    With several jobs, trainings run side by side in other processes, those of joblib's current backend: its own on this
    machine, or those of a cluster inside `joblib.parallel_config("dask")`. The scores are those of one job with the same number
    of threads for a training, which is `OMP_NUM_THREADS` if that is set, and else PyTorch's number divided by the jobs.

    Several processes, as `accelerate launch` starts them, train every model together, see `train_sequence`. The first one writes
    the run directory, which the others must be able to read, and its callbacks are called.

    Args:
        config: from `load_config`.
        out: the run directory; by default `runs/<name>`.
        resume: go on where a run of the same config stopped.
        overwrite: replace the results that the directory holds.
        callbacks: passed on to `train_sequence`; the methods of an `ExperimentCallback` are also called between trainings.
        jobs: trainings that run side by side, at most as many as there are cores; 1 trains in this process; -1 is one for each
            core.
        imports: modules that each job imports first, because they change more than the components of the config.
        command: the command line that starts the run, which is stored in `environment.json`.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: the config cannot be trained; the directory holds results and neither `resume` nor `overwrite` is set, or
            other files, or another process is running there; there are more jobs than cores, or several of them and several
            processes.
        RunError: trainings have failed, the disk is full, the report of the finished run cannot be drawn, or one of several
            processes has ended.
    """
    if launched_processes() > 1:
        if jobs != 1:
            raise UserError(
                "several processes train one model after the other: pass --jobs, or start several processes, not both"
            )
        make_accelerator()  # the processes find each other
        meet()
    if out is not None and not str(out).strip():
        raise UserError("out is empty; name a folder, or '.' for the working directory")
    out = default_directory(config) if out is None else Path(out)
    jobs = check_jobs(jobs, num_trainings(config))
    if jobs > 1:
        check_callbacks(callbacks, jobs)
    read_splits = partial(build_splits, config, learned=learned_splits(out) if resume else None)
    splits = first_then_others(read_splits)
    joined = {method.title for method in config.methods if getattr(METHODS[method.name], "joins_splits", False)}
    directory = RunDirectory(
        out,
        config.to_yaml(),
        Results(
            name=config.name, splits=[split.name for split in splits], primary_metric=config.evaluation.primary_metric
        ),
        folders=[run.folder for run in runs_of(config)],
        data={split.name: fingerprint_of_split(split) for split in splits} | fingerprints_of_start(config, splits),
        learned=LearnedSplits.of(splits),
        joined=joined,
        resume=resume,
        overwrite=overwrite,
        command=command,
    )
    on_first(partial(check_run_directory, directory))
    _check_joined(joined, splits)
    dry_run(config, splits)
    threads = torch.get_num_threads() if jobs == 1 else threads_of_a_job(jobs)
    with num_threads(threads), _open_for_all(directory) as results:
        journal = Journal(config, results, out.resolve() if jobs > 1 else out, callbacks if process_rank() == 0 else ())
        if jobs == 1:
            _train_all(config, splits, journal, resume, callbacks)
        else:
            splits = []  # every worker reads its own
            workers = Workers(jobs, surroundings_of_jobs(threads, imports), _train_in_worker, _score_in_worker)
            train_side_by_side(config, journal, resume=resume, workers=workers)
        if results.runs:
            shown = splits or read_splits()
            on_first(partial(_report, config, out, shown))
    _check_failures(journal.failures, some_are_stored=bool(results.runs))
    return results


def _check_failures(failures: Sequence[str], *, some_are_stored: bool) -> None:
    """Raises `RunError` if trainings have failed, with the sentence of each of the first few."""
    if failures:
        shown, num_more = failures[:MOST_FAILURES], len(failures) - MOST_FAILURES
        more = f"; and {num_more} more" if num_more > 0 else ""
        stored = "the others are stored; " if some_are_stored else ""
        raise RunError(f"{'; '.join(shown)}{more} ({stored}--resume tries what has failed again)")


@contextmanager
def _open_for_all(directory: RunDirectory) -> Iterator[Results]:
    """Opens the run directory in the first process, for the body of the `with` statement; all get its results."""
    with ExitStack() as opened:
        yield on_first(lambda: opened.enter_context(open_run_directory(directory)))


def default_directory(config: Config) -> Path:
    """Where a run is written to if it is not said."""
    return Path("runs") / config.name


def _train_all(
    config: Config,
    splits: Sequence[Split],
    journal: Journal,
    resume: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Trains what the results lack, in this process, and writes them after every training."""
    chosen = []
    for method in config.methods:
        if method.select is not None:
            _try_candidates(config, method, journal, callbacks)
        selected = method if method.select is None else journal.selected(method)
        chosen += [] if selected is None else [selected]
    config = config.model_copy(update={"methods": tuple(chosen)})
    for run in journal.missing(config):
        try:
            record = _train(config, splits, run, journal.out, resume, callbacks)
        except RunError as error:
            # Of several processes one may have failed alone, and another training would not find them together
            if is_of_the_disk(error) or num_processes() > 1:
                raise
            journal.fail(run, str(error))
        else:
            journal.record(record)
            with suppress(UserError):  # of a damaged file; it is said when the report is written
                on_first(partial(update_items, journal.out, splits, thumbnails=config.report.thumbnails))


def _check_joined(joined: Collection[str], splits: Sequence[Split]) -> None:
    """Raises `UserError` for methods that train on all splits at once, if the data of some is missing."""
    missing = [split.name for split in splits if not len(split.train)]
    if joined and missing:
        raise UserError(
            f"methods.{', '.join(sorted(joined))} trains on all splits at once, but the data of "
            f"{shortened(printable(', '.join(missing)))} is missing; bring it back, or leave the method out of the config, which "
            "keeps the results that it has"
        )


def _report(config: Config, out: Path, splits: Sequence[Split]) -> None:
    """Writes the report, and the items that it shows; whatever keeps it from being drawn loses no results."""
    try:
        update_items(out, splits, thumbnails=config.report.thumbnails)
        write_report(out, changes_of=changed_options)
    except Exception as error:
        raise RunError(
            f"everything is trained, and its scores are in {out / RESULTS_FILE}, but the report cannot be written: "
            f"{reason_of(error)}; `mas-embed report` tries again"
        ) from error


def _train(
    config: Config, splits: Sequence[Split], run: Run, out: Path, resume: bool, callbacks: Sequence[Callback]
) -> RunRecord:
    folder = out / run.folder
    on_first(partial(_make_folder, folder))
    training = build_training(config, run.method, splits, seed=run.seed)
    checkpoint, is_first = folder / CHECKPOINT_FILE, process_rank() == 0
    try:
        if training.evaluate_on is not None and resume:
            on_first(partial(_remove_checkpoint_of_fewer_splits, checkpoint, [split.name for split in splits]))
        if not (resume and has_checkpoint(checkpoint)):  # a checkpoint holds what the method has stored
            for log in LOG_FILES if is_first else ():
                (folder / log).unlink(missing_ok=True)
            on_first(partial(remove_recording, folder))
            consolidate_start(config, run.method, training, splits, seed=run.seed)
        result = train_sequence(
            **vars(training),
            seed=run.seed,
            checkpoint=checkpoint,
            resume=resume,
            checkpoint_every=CheckpointEvery(**dict(config.training.checkpoint_every)),
            callbacks=[
                EpochLog(folder / LOG_FILE),
                *recording_callbacks(folder, training, splits),
                *build_callbacks(config, folder),
                *callbacks,
            ]
            if is_first
            else (),
        )
        on_first(partial(save_model, folder / MODEL_FILE, training.model, training.method, splits=splits))
    except (RunError, UserError) as error:
        # The config was tried out before: an error now comes from the training itself
        raise RunError(f"{run.method.title} seed {run.seed}: {error}") from error
    try:
        return result.as_record(
            {
                "method": run.method.title,
                "folder": run.folder,
                "options": run.method.options,
                "importance_data": config.importance_of(run.method),
            }
        )
    except ValidationError as error:
        mistake = first_mistake(error)
        raise RunError(
            f"{run.method.title} seed {run.seed}: what was measured cannot be recorded ({mistake})"
        ) from error


def _remove_checkpoint_of_fewer_splits(checkpoint: Path, splits: list[str]) -> None:
    """Lets a method that trains on all splits at once start anew where splits were appended."""
    if has_checkpoint(checkpoint):
        plan = read_last_checkpoint(checkpoint)[1].get("plan") or {}
        known = plan.get("evaluated_splits", splits)
        if known != splits and splits[: len(known)] == known:
            for path in (checkpoint, previous_checkpoint(checkpoint)):
                path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _try_candidates(config: Config, method: MethodSection, journal: Journal, callbacks: Sequence[Callback]) -> None:
    """Tries the candidates for the options of a method; every one is written to the results as it ends."""
    assert method.select is not None
    untried = journal.untried(method)
    splits = build_splits(config, held_out=method.select.on) if untried else []

    def score(options: Mapping[str, Any], seed: int) -> float:
        return _validation_score(config, splits, method, options, seed, callbacks)

    for options in untried:
        journal.record_candidate(method, try_candidate(options, method.select.seeds, score))


def _validation_score(
    config: Config,
    splits: Sequence[Split],
    method: MethodSection,
    options: Mapping[str, Any],
    seed: int,
    callbacks: Sequence[Callback],
) -> float:
    """The measure of a candidate's training on the validation part, by which options are chosen."""
    assert method.select is not None
    # Subsets may lie in any split, so the components are built for all, whichever are trained
    training = build_training(config, with_candidate(config, method, options), splits, seed=seed)
    training.method.name = name_of_candidate(method.title, dict(options))
    consolidate_start(config, method, training, splits, seed=seed)
    num_splits = None if training.method.joins_splits else method.select.num_splits
    evaluator = without_details(training.evaluator)
    arguments = {**vars(training), "splits": training.splits[:num_splits], "evaluator": evaluator}
    result = train_sequence(**arguments, seed=seed, callbacks=callbacks)
    return float(getattr(result.scores[config.evaluation.primary_metric], method.select.by))


_remembered: dict[tuple[str, str | None], Sequence[Split]] = {}  # the splits of a call and a part that is held out


def _splits_of_call(
    config: Config, call: str, *, learned: LearnedSplits | None = None, held_out: str | None = None
) -> Sequence[Split]:
    """The splits of a config, which a process reads once, however many trainings of a call of `run_experiment` it is given."""
    if (call, held_out) not in _remembered:
        for key in [key for key in _remembered if key[0] != call]:
            del _remembered[key]
        options = {} if held_out is None else {"held_out": held_out}
        _remembered[call, held_out] = build_splits(config, learned=learned, **options)
    return _remembered[call, held_out]


def _train_in_worker(config: Config, call: str, run: Run, out: Path, resume: bool) -> RunRecord:
    """`_train` in another process, which has its own copy of the data."""
    if not out.is_dir():
        raise RunError(
            f"the run directory {out} is not there on the machine of a worker; put it into a folder that all share"
        )
    splits = _splits_of_call(config, call, learned=learned_splits(out) if resume else None)
    return _train(config, splits, run, out, resume, ())


def _score_in_worker(config: Config, call: str, method: MethodSection, options: Mapping[str, Any], seed: int) -> float:
    """`_validation_score` in another process, which has its own copy of the data."""
    assert method.select is not None
    splits = _splits_of_call(config, call, held_out=method.select.on)
    return finite_score(_validation_score(config, splits, method, options, seed, ()))
