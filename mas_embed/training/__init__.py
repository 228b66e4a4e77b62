"""Training over a sequence of splits: the recipe, the loop, one step, callbacks, checkpoints."""

from mas_embed.training.callbacks import (
    CALLBACKS,
    Callback,
    Callbacks,
    EpochEnd,
    EpochLog,
    Event,
    RunEnd,
    SplitEnd,
    StepEnd,
    StepLog,
)
from mas_embed.training.checkpoint import has_checkpoint, lock_of_checkpoint, previous_checkpoint, read_last_checkpoint
from mas_embed.training.checkpointing import CheckpointEvery, SplitCheckpoints
from mas_embed.training.loading import SAMPLERS, per_class_sampler, training_batches
from mas_embed.training.optimizers import OPTIMIZERS, SCHEDULERS, make_optimizer
from mas_embed.training.processes import check_processes, make_accelerator, prepare_model
from mas_embed.training.progress_bar import ProgressBar
from mas_embed.training.recipe import Precision, Recipe
from mas_embed.training.result import SequenceResult
from mas_embed.training.sequence import train_sequence
from mas_embed.training.step import Learner, Stopwatch, learn_split, training_step
from mas_embed.training.tracker import Tracker

__all__ = [
    "CALLBACKS",
    "OPTIMIZERS",
    "SAMPLERS",
    "SCHEDULERS",
    "Callback",
    "Callbacks",
    "CheckpointEvery",
    "EpochEnd",
    "EpochLog",
    "Event",
    "Learner",
    "Precision",
    "ProgressBar",
    "Recipe",
    "RunEnd",
    "SequenceResult",
    "SplitCheckpoints",
    "SplitEnd",
    "StepEnd",
    "StepLog",
    "Stopwatch",
    "Tracker",
    "check_processes",
    "has_checkpoint",
    "learn_split",
    "lock_of_checkpoint",
    "make_accelerator",
    "make_optimizer",
    "per_class_sampler",
    "prepare_model",
    "previous_checkpoint",
    "read_last_checkpoint",
    "train_sequence",
    "training_batches",
    "training_step",
]
