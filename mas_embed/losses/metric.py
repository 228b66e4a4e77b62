"""The losses, miners and samplers of pytorch-metric-learning, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

Kind = Literal["losses", "miners", "samplers", "distances", "reducers", "regularizers"]

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
    """An instance; an option such as `distance: {name: CosineSimilarity}` is built first."""
    built = {
        key: build(NESTED_KINDS[key], value["name"], {k: v for k, v in value.items() if k != "name"})
        if key in NESTED_KINDS and isinstance(value, Mapping)
        else value
        for key, value in options.items()
    }
    return catalogue(kind)[name](**built)
