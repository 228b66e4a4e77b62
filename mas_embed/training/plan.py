"""What a checkpoint is of: the splits, the data, the method, the loss and the recipe with their options, and the seed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mas_embed.data import Split, fingerprint_of_inputs, fingerprint_of_split
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
        "data": [fingerprint_of_split(split) for split in splits],
    }


def check_plan(stored: Any, plan: Mapping[str, Any], *, num_learned: int, source: str) -> None:
    """Raises `UserError` for a checkpoint of another plan.

    Args:
        stored: the plan of the checkpoint.
        plan: that is to be followed.
        num_learned: the number of splits that the checkpoint has learned; files of these may be missing by now.
        source: the checkpoint's path, for messages.
    """
    stored = stored if isinstance(stored, dict) else {}
    differences = []
    for name, value in plan.items():
        was, now = (_without_workers(one) for one in (stored.get(name), value))
        if name != "data" and was != now:
            differences.append("its {} is {}, not {}".format(name, *_difference(was, now)))
    if differences:
        raise UserError(f"the checkpoint {source} is of another sequence: {'; '.join(differences)}")
    data = stored.get("data")
    if not isinstance(data, list) or len(data) != len(plan["data"]):
        raise UserError(f"the checkpoint {source} is damaged: it does not say what data it is of; {REMEDY}")
    for index, (was, now) in enumerate(zip(data, plan["data"], strict=True)):
        is_gone = now is None and index < num_learned
        if was != now and not is_gone:
            raise UserError(
                f"the data of split '{plan['splits'][index]}' is not what the checkpoint {source} was trained with; bring the "
                "old data back, or start anew without the checkpoint"
            )


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
