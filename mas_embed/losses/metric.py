"""The losses and miners of pytorch-metric-learning, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

from mas_embed.errors import UserError, unknown_name

Kind = Literal["losses", "miners", "distances", "reducers", "regularizers"]

# Options of pytorch-metric-learning's classes that are components themselves, and where those are found
NESTED_KINDS: dict[str, Kind] = {
    "distance": "distances",
    "reducer": "reducers",
    "embedding_regularizer": "regularizers",
}


def catalogue(kind: Kind) -> dict[str, type]:
    """Every class of one kind that pytorch-metric-learning exports, by its own name.

    >>> "TripletMarginLoss" in catalogue("losses")
    True
    """
    module = import_module(f"pytorch_metric_learning.{kind}")
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {
        name: value for name, value in classes.items() if not name.startswith("Base") and not name.endswith("Mixin")
    }


def build(kind: Kind, name: str, options: Mapping[str, Any]) -> Any:
    """An instance; an option such as `distance: CosineSimilarity` or `{name: CosineSimilarity, ...}` is built first.

    Raises:
        UserError: there is no such class.
    """
    classes = catalogue(kind)
    if name not in classes:
        raise unknown_name(kind, name, classes)
    return classes[name](**{key: _built(key, value) for key, value in options.items()})


def _built(key: str, value: Any) -> Any:
    if key not in NESTED_KINDS or not isinstance(value, str | Mapping):
        return value
    options = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in options:
        raise UserError(f"{key} needs a name, as in {key}: {{name: ...}}, got {value}")
    return build(NESTED_KINDS[key], options.pop("name"), options)
