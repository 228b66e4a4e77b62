"""The losses and miners of pytorch-metric-learning as components."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

from mas_embed.errors import UserError
from mas_embed.registry import Registry

Kind = Literal["losses", "miners", "distances", "reducers", "regularizers"]


def exported_classes(kind: Kind) -> dict[str, type]:
    """Every class of one kind that pytorch-metric-learning exports, by name.

    >>> "TripletMarginLoss" in exported_classes("losses")
    True
    """
    module = import_module(f"pytorch_metric_learning.{kind}")
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {
        name: value for name, value in classes.items() if not name.startswith("Base") and not name.endswith("Mixin")
    }


LOSSES = Registry("loss", library=partial(exported_classes, "losses"))
MINERS = Registry("miner", library=partial(exported_classes, "miners"))

# Options of the library's classes that are components themselves
NESTED = {
    "distance": Registry("distance", library=partial(exported_classes, "distances")),
    "reducer": Registry("reducer", library=partial(exported_classes, "reducers")),
    "embedding_regularizer": Registry("regularizer", library=partial(exported_classes, "regularizers")),
}


def with_nested_components(constructor: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a loss or miner, with `distance: CosineSimilarity` or `{name: CosineSimilarity, ...}` built.

    Args:
        constructor: of the loss or miner; options of classes from other libraries are returned as they are.
        options: by name.

    Raises:
        UserError: there is no such component, or a mapping does not name one.
    """
    if not constructor.__module__.startswith("pytorch_metric_learning"):
        return dict(options)
    return {key: _build_nested(key, value) for key, value in options.items()}


def _build_nested(key: str, value: Any) -> Any:
    if key not in NESTED or not isinstance(value, str | Mapping):
        return value
    options = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in options:
        raise UserError(f"{key} needs a name, as in {key}: {{name: ...}}, got {value}")
    constructor = NESTED[key][options.pop("name")]
    return constructor(**with_nested_components(constructor, options))
