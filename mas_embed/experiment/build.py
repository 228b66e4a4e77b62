"""The components of a config, built: everything that one training needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mas_embed.config import Component, Config, MethodSection, component_lists, constructor_parameters
from mas_embed.data import (
    DATASETS,
    TRANSFORMS,
    LearnedSplits,
    Split,
    SplitSequence,
    Subset,
    check_splits,
    image_shape,
    join_splits,
    num_classes,
    select_subset,
    transform_splits,
)
from mas_embed.errors import UserError, explained
from mas_embed.evaluation import EVALUATORS, Evaluator, SparseEvaluator
from mas_embed.losses import LOSSES, MINERS, with_nested_components
from mas_embed.methods import METHODS, Loss, Method
from mas_embed.models import MODELS, load_model_weights, preprocessing_of
from mas_embed.registry import remember_made
from mas_embed.runtime.forward import device_of, embed_batch
from mas_embed.runtime.modes import eval_mode
from mas_embed.runtime.seeding import seeded
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS, Callback, Recipe

Provided = Mapping[str, Callable[[], Any]]  # by the name of an option what returns its value


@dataclass(frozen=True)
class Training:
    """Everything that the training of one method with one seed needs.

    Attributes:
        model: with the initial weights of the seed.
        splits: that are trained.
        evaluate_on: the splits that are evaluated, where they are others.
        method: made with the model.
        loss: that is trained.
        miner: or None.
        recipe: how a split is trained.
        evaluator: with the config's options.
        importance_data: unlabeled inputs that the method consolidates on; None for the split's training items.
    """

    model: nn.Module
    splits: Sequence[Split]
    evaluate_on: Sequence[Split] | None
    method: Method
    loss: Loss
    miner: Any
    recipe: Recipe
    evaluator: Evaluator
    importance_data: Any


def build_splits(config: Config, *, learned: LearnedSplits | None = None, **options: Any) -> Sequence[Split]:
    """The splits of a config with its transforms, under its options for the data and those that are given here instead.

    Args:
        config: that names the data set.
        learned: splits that were learned before, whose data may be gone; given to data sets that have such an option.
        options: of the data set.

    Raises:
        UserError: the data cannot be read, or cannot be trained and evaluated, or a transform does not work on it.
    """
    constructor, options = DATASETS[config.data.name], {**config.data.options, **options}
    if learned is not None and "learned" in constructor_parameters(constructor):
        options["learned"] = learned
    with explained("data"), seeded(0):
        splits: Sequence[Split] = constructor(**options)
        check_splits(splits, may_be_missing=learned is not None)
        if learned is not None:
            check_splits([split for split in splits if split.name not in learned.names] or splits_with_data(splits))
            splits = splits if isinstance(splits, SplitSequence) else SplitSequence(splits)
            splits.learned = learned
    return _with_transforms(config, splits)


def splits_with_data(splits: Sequence[Split]) -> Sequence[Split]:
    """The splits that can be trained and evaluated, which are all of them unless data of learned ones is gone.

    Raises:
        UserError: there is none.
    """
    present = [split for split in splits if len(split.train) and len(split.query)]
    if len(present) == len(splits):
        return splits
    if not present:
        raise UserError("the data of all splits is missing; bring some back, or append splits")
    some = copy.copy(splits) if isinstance(splits, SplitSequence) else SplitSequence(splits)
    some[:] = present
    return some


def _with_transforms(config: Config, splits: Sequence[Split]) -> Sequence[Split]:
    section, model = config.transforms, config.model
    first = splits_with_data(splits)[0]
    augment = []
    if section.augment:
        with explained("transforms.augment"):
            size = list(image_shape(first.train.inputs)[1:])
        augment = [
            _construct(
                f"transforms.augment.{one.name}", TRANSFORMS[one.name], one.options, {"size": partial(_value, size)}
            )
            for one in section.augment
        ]
    normalize: Any = "data" if section.normalize == "data" else None
    learned = splits.learned if isinstance(splits, SplitSequence) else None
    if normalize == "data" and learned is not None and learned.preprocessing is not None:
        normalize = learned.preprocessing.normalize  # the first split's, whose data may be gone
    if section.normalize == "weights":
        normalize = preprocessing_of(model.name, model.options)
    with explained("transforms"), seeded(0):
        transformed = transform_splits(splits, augment=augment, normalize=normalize)
        if augment:
            # A transform that does not fit is found before anything is trained
            splits_with_data(transformed)[0].train.augmented[0]
    return transformed


def build_training(config: Config, method: MethodSection, splits: Sequence[Split], *, seed: int) -> Training:
    """The components of one training.

    Args:
        config: that names them.
        method: one of its methods, or one with other options.
        splits: from `build_splits`.
        seed: of the initial weights of the model and the loss.

    Raises:
        UserError: names the key of the component that cannot be built.
    """
    with seeded(seed):  # proxies and the like are drawn at random, too
        model = build_model(config, splits, seed=seed)
        loss = _build_loss(config.loss, "loss", model, splits)
        built = _build_method(method, f"methods.{method.title}", model, loss, splits)
        built.name = method.title
        importance_data = config.importance_of(method)
        return Training(
            model=model,
            splits=[join_splits(splits)] if built.joins_splits else splits,
            evaluate_on=splits if built.joins_splits else None,
            method=built,
            loss=loss,
            miner=_build_miner(config),
            recipe=_build_recipe(config),
            evaluator=_build_evaluator(config, splits),
            importance_data=None
            if importance_data == "train"
            else build_subset(config, importance_data, splits).part.inputs,
        )


def build_model(config: Config, splits: Sequence[Split], *, seed: int) -> nn.Module:
    """The model of a config, its initial weights drawn from the seed, or those of `start.weights`."""
    with seeded(seed):
        model: nn.Module = _construct(
            "model", MODELS[config.model.name], config.model.options, _provided(splits), written=config.model
        )
    if config.start.weights is not None:
        with explained("start.weights"):
            load_model_weights(model, Path(config.start.weights))
    return model


def build_callbacks(config: Config, folder: Path) -> list[Callback]:
    """The callbacks of a config for the run in a folder."""
    provided = {"folder": lambda: folder, "config": lambda: config.model_dump(mode="json")}
    return [_construct(f"callbacks.{one.name}", CALLBACKS[one.name], one.options, provided) for one in config.callbacks]


def _provided(splits: Sequence[Split], **others: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """What the data set provides by itself, the splits, and others."""
    of_data = splits.provides if isinstance(splits, SplitSequence) else {}
    return {**{name: partial(_value, value) for name, value in of_data.items()}, "splits": lambda: splits, **others}


def _value(value: Any) -> Any:
    return value


def _construct(
    config_key: str,
    constructor: Callable[..., Any],
    options: Mapping[str, Any],
    provided: Provided,
    *args: Any,
    written: Component | None = None,
) -> Any:
    """A component with its options, and with what the run provides for the parameters that these leave out.

    With `written`, the component as the config has it, it is noted how to make the same one again, see `made_by_name`.

    Raises:
        UserError: names the key; an option that is also provided has another value.
    """
    with explained(config_key):
        arguments = dict(options)
        for name in constructor_parameters(constructor).keys() & provided.keys():
            value = provided[name]()
            if name in options and options[name] != value:
                raise UserError(
                    f"{name} is {options[name]!r} in the config, but {value!r} in this run; leave it out to have it filled in"
                )
            arguments[name] = value
        component = constructor(*args, **arguments)
    if written is not None:
        remember_made(component, written.name, {**arguments, **written.options})
    return component


def _build_loss(component: Component, config_key: str, model: nn.Module, splits: Sequence[Split]) -> Loss:
    constructor = LOSSES[component.name]
    with explained(config_key):
        options = with_nested_components(constructor, component.options)
    provided = _provided(
        splits,
        num_classes=lambda: num_classes(splits),
        embedding_size=cache(lambda: embedding_size(model, splits)),
    )
    loss: Loss = _construct(config_key, constructor, options, provided, written=component)
    return loss


def embedding_size(model: nn.Module, splits: Sequence[Split]) -> int:
    """D, by embedding one training item."""
    inputs = torch.utils.data.default_collate([splits_with_data(splits)[0].train[0]])[0]
    with torch.no_grad(), eval_mode(model):
        return embed_batch(model, inputs.to(device_of(model)) if isinstance(inputs, torch.Tensor) else inputs).shape[1]


def _build_method(
    component: Component, config_key: str, model: nn.Module, loss: Loss, splits: Sequence[Split]
) -> Method:
    """A method; one that takes the training loss is given it, unless it names another."""
    constructor, options = METHODS[component.name], dict(component.options)
    for name in component_lists(constructor, Method):
        parts = [Component.model_validate(part) for part in options[name]]
        options[name] = [_build_method(part, config_key, model, loss, splits) for part in parts]
    provided = _provided(splits, loss=lambda: loss)
    if options.get("loss") is not None:
        options["loss"] = _build_loss(Component.model_validate(options["loss"]), f"{config_key}.loss", model, splits)
        del provided["loss"]
    method: Method = _construct(config_key, constructor, options, provided, model)
    return method


def _build_miner(config: Config) -> Any:
    miner = config.training.miner
    if miner is None:
        return None
    with explained("training.miner"):
        constructor = MINERS[miner.name]
        return constructor(**with_nested_components(constructor, miner.options))


def _build_recipe(config: Config) -> Recipe:
    training = config.training
    sampler, scheduler = training.sampler, training.scheduler
    return Recipe(
        epochs=training.epochs,
        batch_size=training.batch_size,
        optimizer=partial(OPTIMIZERS[training.optimizer.name], **training.optimizer.options),
        scheduler=partial(SCHEDULERS[scheduler.name], **scheduler.options) if scheduler else None,
        sampler=partial(SAMPLERS[sampler.name], **sampler.options) if sampler else None,
        num_workers=training.num_workers,
        clip_norm=training.clip_norm,
        accumulate=training.accumulate,
        precision=training.precision,
        compile=training.compile,
    )


def _build_evaluator(config: Config, splits: Sequence[Split]) -> Evaluator:
    section = config.evaluation
    provided = _provided(splits, subsets=lambda: {name: build_subset(config, name, splits) for name in config.subsets})
    evaluator: Evaluator = _construct("evaluation", EVALUATORS[section.name], section.options, provided)
    if section.every == 1 and not section.only_learned:
        return evaluator
    return SparseEvaluator(evaluator, every=section.every, only_learned=section.only_learned)


def build_subset(config: Config, name: str, splits: Sequence[Split]) -> Subset:
    """One of the subsets that a config names."""
    section = config.subsets[name]
    with explained(f"subsets.{name}"):
        return select_subset(splits, split=section.split, part=section.part, labels=section.labels)
