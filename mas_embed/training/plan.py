"""What a checkpoint is of: the splits, the data, the method, the loss and the recipe with their options, and the seed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mas_embed.data import Split, empty_part, fingerprint_of_inputs, fingerprints_of_parts
from mas_embed.errors import UserError
from mas_embed.runtime.text import shortened
from mas_embed.training.checkpoint import REMEDY
from mas_embed.training.step import Learner

DEEPEST = 4  # an option of an option of ...


def make_plan(
    learner: Learner, splits: Sequence[Split], evaluated_splits: Sequence[Split], *, importance_data: Any, seed: int
) -> dict[str, Any]:
    """Everything that decides what is trained, as JSON; the model and the evaluator check their own state."""
    return {
        "splits": [split.name for split in splits],
        "evaluated_splits": [split.name for split in evaluated_splits],
        "method": describe(learner.method),
        "loss": describe(learner.loss),
        "miner": describe(learner.miner),
        "recipe": describe(learner.recipe),
        "importance_data": None if importance_data is None else fingerprint_of_inputs(importance_data),
        "seed": seed,
        "data": [fingerprints_of_parts(split) for split in splits],
    }


def check_plan(
    stored: Any, plan: Mapping[str, Any], *, num_learned: int, is_within_split: bool, source: str
) -> dict[str, Any]:
    """The plan that is followed from a checkpoint on. It may have further splits after those of the checkpoint.

    A loss may then have more classes, and if the checkpoint has learned all of its splits, the importance data may be other.

    Args:
        stored: the plan of the checkpoint.
        plan: that is to be followed.
        num_learned: the number of splits that the checkpoint has learned; files of these may be missing by now.
        is_within_split: whether the checkpoint is in the middle of a split, whose loss has the classes of before.
        source: the checkpoint's path, for messages.

    Returns:
        The plan, with the stored fingerprints of data that is missing by now.

    Raises:
        UserError: the checkpoint is of another plan, or the data of a split has changed, or is missing before it was learned.
    """
    stored = stored if isinstance(stored, dict) else {}
    names = stored.get("splits")
    num_stored = len(names) if isinstance(names, list) else 0
    is_longer = len(plan["splits"]) > num_stored
    differences = []
    for name, value in plan.items():
        was, now = (_without_workers(one) for one in (stored.get(name), value))
        if is_longer and name in ("splits", "evaluated_splits"):
            now = now[: len(was)] if isinstance(was, list) else now
        elif is_longer and not is_within_split:
            was, now = _without_num_classes(was), _without_num_classes(now)
        is_not_read_again = name == "importance_data" and is_longer and num_learned == num_stored
        if was != now and name != "data" and not is_not_read_again:
            differences.append(
                "its {} is {}, not {}".format(name, *_difference(was, value if isinstance(value, list) else now))
            )
    if differences:
        raise UserError(f"the checkpoint {source} is of another sequence: {'; '.join(differences)}")
    data = stored.get("data")
    if not isinstance(data, list) or len(data) != num_stored or not all(isinstance(one, dict) for one in data):
        raise UserError(f"the checkpoint {source} is damaged: it does not say what data it is of; {REMEDY}")
    known = [*data, *({} for _ in plan["data"][num_stored:])]
    rows = zip(plan["splits"], known, plan["data"], strict=True)
    return {
        **plan,
        "data": [_checked_data(*row, is_learned=index < num_learned, source=source) for index, row in enumerate(rows)],
    }


def _checked_data(
    name: str, stored: Mapping[str, Any], found: Mapping[str, Any], *, is_learned: bool, source: str
) -> dict[str, Any]:
    """The fingerprints of the data of a split, by part; those of the checkpoint for what is gone."""
    if not is_learned and None in found.values():
        raise UserError(f"the data of split '{name}' is missing, which {source} has not learned yet; bring it back")
    for part, fingerprint in found.items():
        if fingerprint is not None and stored.get(part) not in (None, fingerprint):
            raise UserError(
                f"the data of split '{name}' is not what the checkpoint {source} was trained with; bring the old data back, or "
                "start anew without the checkpoint"
            )
    return {part: stored.get(part) if fingerprint is None else fingerprint for part, fingerprint in found.items()}


def _without_num_classes(value: Any) -> Any:
    """A description without the numbers of classes in it, which grow with the splits."""
    if isinstance(value, Mapping):
        return {key: _without_num_classes(inner) for key, inner in value.items() if key != "num_classes"}
    return [_without_num_classes(inner) for inner in value] if isinstance(value, list) else value


def without_missing_files(splits: Sequence[Split], num_learned: int) -> Sequence[Split]:
    """The splits, of which those that were learned have no items in a part whose files are missing."""

    def available(split: Split) -> Split:
        found = fingerprints_of_parts(split)
        return Split(
            split.name,
            empty_part() if found["train"] is None else split.train,
            *((empty_part(), empty_part()) if found["held_out"] is None else (split.query, split.gallery)),
        )

    return [*map(available, splits[:num_learned]), *splits[num_learned:]]


def _without_workers(description: Any) -> Any:
    """A description of a recipe without the number of processes that load its batches, which changes none of them."""
    is_recipe = isinstance(description, dict) and description.get("name") == "Recipe"
    return {key: value for key, value in description.items() if key != "num_workers"} if is_recipe else description


def _difference(stored: Any, value: Any) -> tuple[str, str]:
    """Two different values as text; of components their names, or the options in which they differ."""
    if isinstance(stored, dict) and isinstance(value, dict):
        if stored.get("name") != value.get("name"):
            return str(stored.get("name")), str(value.get("name"))
        keys = [key for key in {**stored, **value} if stored.get(key) != value.get(key)]
        stored, value = ({key: options.get(key) for key in keys} for options in (stored, value))
    return shortened(repr(stored), 100), shortened(repr(value), 100)


def describe(component: Any, depth: int = 0) -> Any:
    """A component as JSON: its class, and those options of its constructor that it keeps under their names.

    >>> import torch
    >>> describe(partial(torch.optim.Adam, lr=0.1))
    {'name': 'Adam', 'lr': 0.1}
    """
    if component is None or isinstance(component, bool | int | float | str):
        return component
    if isinstance(component, Mapping):
        return {str(key): describe(value, depth + 1) for key, value in component.items()}
    if isinstance(component, list | tuple):
        return [describe(value, depth + 1) for value in component]
    if isinstance(component, Tensor):
        return {"name": "Tensor", "shape": list(component.shape)}
    if isinstance(component, partial):
        return {"name": _name(component.func), **describe(component.keywords, depth)}
    if inspect.isroutine(component) or isinstance(component, type):
        return {"name": _name(component)}
    return {"name": _name(type(component)), **(_options(component, depth + 1) if depth < DEEPEST else {})}


def _options(component: Any, depth: int) -> dict[str, Any]:
    constructors = [vars(base)["__init__"] for base in type(component).__mro__[:-1] if "__init__" in vars(base)]
    with_names = [one for one in constructors if inspect.isfunction(one)]  # not those of classes that C defines
    names = {name for one in with_names for name in inspect.signature(one).parameters} - {"self", "model"}
    return {name: describe(getattr(component, name), depth) for name in sorted(names) if hasattr(component, name)}


def _name(component: Any) -> str:
    return str(getattr(component, "__qualname__", type(component).__qualname__))
