"""A whole experiment: components built from a config, the dry run, the search for options, the runner."""

from mas_embed.experiment.build import Training, build_model, build_splits, build_training
from mas_embed.experiment.dry_run import dry_run
from mas_embed.experiment.imports import import_modules
from mas_embed.experiment.jobs import ALL_CORES, cluster
from mas_embed.experiment.load_run import load_run
from mas_embed.experiment.run_directory import ERROR_FILE, write_into_run_directory
from mas_embed.experiment.run_progress import RunProgress
from mas_embed.experiment.runner import default_directory, run_experiment
from mas_embed.experiment.runs import ExperimentCallback, Run, num_trainings, runs_of
from mas_embed.experiment.saved_model import SavedModel, load_model, save_model

__all__ = [
    "ALL_CORES",
    "ERROR_FILE",
    "ExperimentCallback",
    "Run",
    "RunProgress",
    "SavedModel",
    "Training",
    "build_model",
    "build_splits",
    "build_training",
    "cluster",
    "default_directory",
    "dry_run",
    "import_modules",
    "load_model",
    "load_run",
    "num_trainings",
    "run_experiment",
    "runs_of",
    "save_model",
    "write_into_run_directory",
]
