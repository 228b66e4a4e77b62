"""A whole experiment: components built from a config, the dry run, the search for options, the runner."""

from mas_embed.experiment.build import Training, build_model, build_splits, build_training
from mas_embed.experiment.dry_run import dry_run
from mas_embed.experiment.run_directory import ERROR_FILE, write_into_run_directory
from mas_embed.experiment.runner import (
    ExperimentCallback,
    Run,
    default_directory,
    num_trainings,
    run_experiment,
    runs_of,
)

__all__ = [
    "ERROR_FILE",
    "ExperimentCallback",
    "Run",
    "Training",
    "build_model",
    "build_splits",
    "build_training",
    "default_directory",
    "dry_run",
    "num_trainings",
    "run_experiment",
    "runs_of",
    "write_into_run_directory",
]
