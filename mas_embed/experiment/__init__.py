"""A whole experiment: components built from a config, the dry run, the search for options, the runner, typed results."""

from mas_embed.experiment.build import Training, build_model, build_splits, build_training
from mas_embed.experiment.dry_run import dry_run
from mas_embed.experiment.results import Details, Results, RunRecord, join_results, read_results
from mas_embed.experiment.run_directory import CONFIG_FILE, ENVIRONMENT_FILE, ERROR_FILE
from mas_embed.experiment.runner import ExperimentCallback, Run, num_trainings, run_experiment, runs_of

__all__ = [
    "CONFIG_FILE",
    "ENVIRONMENT_FILE",
    "ERROR_FILE",
    "Details",
    "ExperimentCallback",
    "Results",
    "Run",
    "RunRecord",
    "Training",
    "build_model",
    "build_splits",
    "build_training",
    "dry_run",
    "join_results",
    "num_trainings",
    "read_results",
    "run_experiment",
    "runs_of",
]
