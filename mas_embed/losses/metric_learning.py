"""The losses and miners of pytorch-metric-learning, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.runtime.text import shortened

Kind = Literal["losses", "miners", "distances", "reducers", "regularizers"]


def exported_classes(kind: Kind) -> dict[str, type]:
    """All classes of one kind that pytorch-metric-learning exports, by name; base classes and mixins are left out.

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

# Options of losses and miners whose values are components of the library too
NESTED = {
    "distance": Registry("distance", library=partial(exported_classes, "distances")),
    "reducer": Registry("reducer", library=partial(exported_classes, "reducers")),
    "embedding_regularizer": Registry("regularizer", library=partial(exported_classes, "regularizers")),
}


def with_nested_components(constructor: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a loss or miner, in which names of distances, reducers and regularizers are replaced by objects.

    Args:
        constructor: the class of the loss or miner. Options of classes from other libraries are returned unchanged.
        options: the options by name. A component is given by its name, `distance: CosineSimilarity`, or with its options,
            `distance: {name: CosineSimilarity, ...}`.

    Raises:
        UserError: the library has no such component, or a mapping lacks the key `name`.

    Examples:
        >>> constructor = LOSSES["TripletMarginLoss"]
        >>> with_nested_components(constructor, {"margin": 0.1, "distance": "CosineSimilarity"})
        {'margin': 0.1, 'distance': CosineSimilarity()}
    """
    if not constructor.__module__.startswith("pytorch_metric_learning"):
        return dict(options)
    return {key: _build_nested(key, value) for key, value in options.items()}


def _build_nested(key: str, value: Any) -> Any:
    if key not in NESTED or not isinstance(value, str | Mapping):
        return value
    options = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in options:
        raise UserError(f"{key} needs a name, as in {key}: {{name: ...}}, got {shortened(repr(value))}")
    constructor = NESTED[key][options.pop("name")]
    return constructor(**with_nested_components(constructor, options))
