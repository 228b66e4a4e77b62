"""The directory of a run: made, resumed or replaced, and never overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

from mas_embed.errors import UserError
from mas_embed.evaluation import CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE, Results, read_results
from mas_embed.report import REPORT_FILES
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.environment import describe_environment

ERROR_FILE = "error.log"
FILES = (CONFIG_FILE, ENVIRONMENT_FILE, RESULTS_FILE, *REPORT_FILES, ERROR_FILE)

LOG_FILE = "log.jsonl"
FILES_OF_A_RUN = (LOG_FILE, "checkpoint.safetensors", "steps.jsonl")


def open_run_directory(out: Path, config_yaml: str, fresh: Results, *, resume: bool, overwrite: bool) -> Results:
    """Makes the directory, or takes it over.

    Args:
        out: the directory.
        config_yaml: the resolved config, written as `config.yaml`.
        fresh: the results before anything has run.
        resume: go on with a run of the same config.
        overwrite: remove the run that is there.

    Returns:
        The results that are there already, or a copy of `fresh`.

    Raises:
        UserError: there is a run and neither flag, or one of another config; or the directory cannot be written.
    """
    if resume and overwrite:
        raise UserError("--resume keeps what is there and --overwrite replaces it; give one of them")
    exists = any((out / name).exists() for name in (CONFIG_FILE, RESULTS_FILE))
    if exists and not (resume or overwrite):
        raise UserError(
            f"{out} holds a run already: pass --resume to go on with it, --overwrite to replace it, or another --out"
        )
    try:
        if exists and resume:
            return _results_to_resume(out, config_yaml, fresh)
        if exists:
            _remove_run(out)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / CONFIG_FILE, config_yaml)
        write_file(out / ENVIRONMENT_FILE, json.dumps(describe_environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot use {out} as a run directory: {error.strerror}; name another with --out") from None
    return fresh.model_copy(deep=True)


def _results_to_resume(out: Path, config_yaml: str, fresh: Results) -> Results:
    config_path = out / CONFIG_FILE
    if not config_path.exists() or config_path.read_text(encoding="utf-8") != config_yaml:
        raise UserError(f"{out} holds a run of another config, which this one cannot resume; compare {config_path}")
    if not (out / RESULTS_FILE).exists():
        return fresh.model_copy(deep=True)
    results = read_results(out)
    if any(getattr(results, key) != getattr(fresh, key) for key in ("name", "splits", "primary_metric")):
        raise UserError(f"{out / RESULTS_FILE} is not of this config; start anew with --overwrite")
    return results


def _remove_run(out: Path) -> None:
    """Removes the files that a run wrote, and nothing else."""
    for log in list(out.glob(f"*/seed*/{LOG_FILE}")):
        for name in FILES_OF_A_RUN:
            log.with_name(name).unlink(missing_ok=True)
        for folder in (log.parent, log.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
    for name in FILES:
        (out / name).unlink(missing_ok=True)
