"""A whole run tried out on one batch of a split, before anything is written."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.config import Config, MethodSection
from mas_embed.data import Split, SplitSequence, ordered_batches
from mas_embed.errors import UserError, component_at_fault, explained, unknown_name
from mas_embed.evaluation import BEFORE_FIRST, check_evaluable, without_details
from mas_embed.experiment.build import (
    Training,
    build_callbacks,
    build_splits,
    build_subset,
    build_training,
    embedding_size,
    splits_with_data,
)
from mas_embed.experiment.start import consolidate_start
from mas_embed.runtime.seeding import seeded
from mas_embed.training import (
    Callback,
    Callbacks,
    EpochEnd,
    Event,
    Learner,
    Recipe,
    Stopwatch,
    check_processes,
    learn_split,
    make_accelerator,
    make_optimizer,
    prepare_model,
    training_batches,
)

MOST_LABELS = 1000  # of a split that are tried at either end of their range
MOST_EPOCHS = 10_000  # that a scheduler is tried for


def dry_run(config: Config, splits: Sequence[Split]) -> None:
    """Builds everything that a config names and learns one batch of two splits with every method; writes nothing.

    Goes through the same code as a run, on models that are thrown away.

    Args:
        config: that is tried.
        splits: from `build_splits`.

    Raises:
        UserError: names the key of the config whose component does not work.
    """
    splits = splits_with_data(splits)
    with seeded(0):
        for index, method in enumerate(config.methods):
            training = build_training(config, method, splits, seed=0)
            if index == 0:
                _check_evaluation(config, training, splits)
                _check_validation_parts(config, training, splits)
                _check_subsets_and_callbacks(config, splits)
                _check_labels(training, splits)
                _check_scheduler(training)
            _check_sampler(training)
            consolidate_start(config, method, training, splits, seed=0, num_batches=1)
            _try_method(method, training)


def _check_evaluation(config: Config, training: Training, splits: Sequence[Split]) -> None:
    with explained("evaluation"):
        metrics = check_evaluable(training.evaluator, splits)
        if metrics is None:
            metrics = training.evaluator.evaluate(training.model, splits, BEFORE_FIRST).scores
    if config.evaluation.primary_metric not in metrics:
        raise unknown_name("evaluation.primary_metric", config.evaluation.primary_metric, metrics)


def _check_validation_parts(config: Config, training: Training, splits: Sequence[Split]) -> None:
    """The parts of the data on which options are chosen must be evaluable, too."""
    for part in dict.fromkeys(method.select.on for method in config.methods if method.select is not None):
        learned = splits.learned if isinstance(splits, SplitSequence) else None
        evaluated = splits_with_data(build_splits(config, learned=learned, held_out=part))
        with explained(f"data with held_out={part}, on which options are chosen"):
            check_evaluable(without_details(training.evaluator), evaluated)


def _check_sampler(training: Training) -> None:
    if training.recipe.sampler is not None:
        for split in training.splits:
            with explained(f"training.sampler on split '{split.name}'"):
                training.recipe.sampler(split.train.labels)


def _check_subsets_and_callbacks(config: Config, splits: Sequence[Split]) -> None:
    for name in config.subsets:
        build_subset(config, name, splits)
    if config.callbacks:
        with tempfile.TemporaryDirectory() as folder:
            build_callbacks(config, Path(folder))


def _check_labels(training: Training, splits: Sequence[Split]) -> None:
    """Miner and loss must take the labels of every split, not only those of the batches that are tried."""
    with explained("model"):
        size = embedding_size(training.model, splits)
    for split in splits:
        labels = split.train.labels.unique()
        if len(labels) > 2 * MOST_LABELS:  # the smallest and the largest decide
            labels = torch.cat([labels[:MOST_LABELS], labels[-MOST_LABELS:]])
        for batch in labels.repeat_interleave(2).split(max(training.recipe.batch_size, 4)):
            embeddings = torch.randn(len(batch), size, requires_grad=True)
            loss, miner = copy.deepcopy(training.loss), copy.deepcopy(training.miner)
            with explained(f"training.miner on the labels of split '{split.name}'"):
                mined = miner(embeddings, batch) if miner is not None else None
            with explained(f"loss on the labels of split '{split.name}'"):
                loss(embeddings, batch, mined)


def _check_scheduler(training: Training) -> None:
    """A scheduler must be able to step after every epoch, and must give learning rates."""
    recipe = training.recipe
    if recipe.scheduler is None:
        return
    with explained("training.optimizer"):
        optimizer = make_optimizer(training.model, [], recipe.optimizer)
    with explained("training.scheduler"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run will show them
        scheduler = recipe.scheduler(optimizer)
        needed = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
        if needed:
            raise UserError(
                f"it steps on a measured value ({needed[0].name}), which training does not give it; take another"
            )
        optimizer.step()
        for epoch in range(min(recipe.epochs, MOST_EPOCHS)):
            scheduler.step()
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            if not all(0 <= rate < math.inf for rate in rates):
                raise UserError(f"the learning rate is {rates[0]} after epoch {epoch + 1}, which must be a number >= 0")


def _try_method(method: MethodSection, training: Training) -> None:
    """Learns one batch of the first split and one of a later one."""
    recipe = _one_batch(training.recipe)
    accelerator = make_accelerator(recipe)
    with explained("training"):
        check_processes(accelerator, training.model, training.method, training.recipe)
    model = prepare_model(training.model, accelerator)
    learner = Learner(model, training.method, training.loss, training.miner, recipe, accelerator)
    callbacks = Callbacks((_RestoreWeights(training.model),))
    keys = {"method": f"methods.{method.title}", "model": "model", "loss": "loss"}
    for split_index, split in enumerate((training.splits[0], training.splits[-1])):
        event = Event(training.method.name, 0, split.name, split_index, 2)
        if training.importance_data is None:
            batches: Iterable[Any] = training_batches(
                split.train, batch_size=recipe.batch_size, sampler=recipe.sampler, view="clean"
            )
        else:
            batches = ordered_batches(training.importance_data, batch_size=recipe.batch_size)
        try:
            learn_split(
                learner,
                split,
                consolidate_on=islice(batches, 1),
                callbacks=callbacks,
                event=event,
                stopwatch=Stopwatch(),
            )
        except Exception as error:
            component = component_at_fault(error)
            if component is None and not isinstance(error, UserError):
                raise
            with explained(keys.get(str(component), f"training.{component}" if component else "training")):
                raise


class _RestoreWeights(Callback):
    """Puts the weights back after an epoch: a step on one batch may have spoilt what the method looks at next."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._weights = model, copy.deepcopy(model.state_dict())

    def on_epoch_end(self, event: EpochEnd) -> None:
        self._model.load_state_dict(self._weights)


def _one_batch(recipe: Recipe) -> Recipe:
    """A recipe whose only epoch is one batch, drawn as the first batch of an epoch is."""
    return replace(recipe, epochs=1, num_workers=0, accumulate=1, sampler=partial(_first_batch, recipe))


def _first_batch(recipe: Recipe, labels: Tensor) -> Any:
    order = recipe.sampler(labels) if recipe.sampler is not None else torch.randperm(len(labels)).tolist()
    return list(islice(order, recipe.batch_size))
