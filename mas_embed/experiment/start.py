"""The model before the first split: what protects it, and by what a changed start is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mas_embed.config import Config, MethodSection
from mas_embed.data import Split, fingerprint_of_inputs, ordered_batches, unlabeled_images
from mas_embed.errors import RunError, UserError, explained, reason_of
from mas_embed.experiment.build import Training, build_subset, splits_with_data
from mas_embed.models import read_weights
from mas_embed.runtime.fingerprint import fingerprint_of_tensors
from mas_embed.runtime.seeding import seeded
from mas_embed.training import make_accelerator

KEY = "start.consolidate_on"


def consolidate_start(
    config: Config,
    method: MethodSection,
    training: Training,
    splits: Sequence[Split],
    *,
    seed: int,
    num_batches: int | None = None,
) -> None:
    """Lets the method of a training consolidate on `start.consolidate_on`; does nothing if the config does not ask for it.

    The model is moved to the device that it is trained on.

    Args:
        config: that says what to consolidate on.
        method: the section of the method.
        training: from `build_training`.
        splits: from `build_splits`.
        seed: of whatever the method draws.
        num_batches: of the first ones, to try them; None for all.

    Raises:
        UserError: the inputs cannot be read, or the method cannot learn from them without labels.
    """
    if not config.consolidates_at_start(method):
        return
    inputs = start_inputs(config, splits)
    training.model.to(make_accelerator(training.recipe).device)
    batches = ordered_batches(inputs, batch_size=training.recipe.batch_size, num_workers=training.recipe.num_workers)
    try:
        with seeded(seed):
            training.method.consolidate(batches if num_batches is None else islice(batches, num_batches))
    except RunError:
        raise
    except Exception as error:
        raise UserError(
            f"methods.{method.title} cannot consolidate before the first split on {KEY}, inputs without labels "
            f"({reason_of(error)}); leave it out by a list start.methods of those that shall"
        ) from error


def start_inputs(config: Config, splits: Sequence[Split]) -> Any:
    """The inputs that `start.consolidate_on` names: a subset without its labels, or the images of a folder.

    Raises:
        UserError: there is neither a subset nor a folder of that name, or its images cannot be read.
    """
    name = str(config.start.consolidate_on)
    if name in config.subsets:
        return build_subset(config, name, splits).part.inputs
    with explained(KEY):
        if not Path(name).is_dir():
            subsets = f"(subsets: {', '.join(config.subsets)})" if config.subsets else "(there are no subsets)"
            raise UserError(f"'{name}' is neither a subset of the config {subsets} nor a folder of images")
        return unlabeled_images(name, like=splits_with_data(splits)[0].train)


def fingerprints_of_start(config: Config, splits: Sequence[Split]) -> dict[str, str | None]:
    """By key of the config a string that changes with the weights and the inputs that the section `start` names."""
    found: dict[str, str | None] = {}
    if config.start.weights is not None:
        with explained("start.weights"):
            found["start.weights"] = fingerprint_of_tensors(dict(read_weights(Path(config.start.weights))))
    if config.start.consolidate_on is not None:
        found[KEY] = fingerprint_of_inputs(start_inputs(config, splits))
    return found
