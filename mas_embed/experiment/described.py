"""How a model and its method were made, as JSON, so that another process can make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mas_embed.errors import UserError, reason_of
from mas_embed.losses import LOSSES, with_nested_components
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS, without_reading_weights
from mas_embed.registry import Registry, made_by_name
from mas_embed.runtime.seeding import seeded


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The class of a model, and its name and options where it was made by name with options that are JSON."""
    described: dict[str, Any] = {"class": type(model).__name__, "name": None}
    made = made_by_name(model)
    options = None if made is None else _as_json(made.options)
    if made is not None and options is not None and made.name in MODELS:
        described |= {"name": made.name, "options": options, "module": MODELS[made.name].__module__}
    return described


def describe_method(method: Method) -> dict[str, Any]:
    """How a method was made: its name in `METHODS`, and its options with the methods and losses among them."""
    name = next((name for name, made in METHODS.items() if made is type(method)), None)
    described: dict[str, Any] = {
        "class": type(method).__name__,
        "module": type(method).__module__,
        "name": name,
        "title": method.name,
        "options": {},
        "methods": {},
        "losses": {},
        "unsaved": [],  # options that a file cannot hold
    }
    for option, value in method._options.items():
        plain, made = _as_json(value), made_by_name(value)
        if isinstance(value, list | tuple) and value and all(isinstance(one, Method) for one in value):
            described["methods"][option] = [describe_method(one) for one in value]
        elif plain is not None or value is None:
            described["options"][option] = plain
        elif made is not None and made.name in LOSSES and _as_json(made.options) is not None:
            described["losses"][option] = {"name": made.name, "options": _as_json(made.options)}
        else:
            described["unsaved"].append(option)
    return described


def model_made_again(described: Mapping[str, Any], source: Path) -> nn.Module:
    """A model from the name and the options of `describe_model`, with any weights.

    Raises:
        UserError: it was not made by name, or cannot be made here; the message names the file.
    """
    remedy = "pass the model, made as it was for training: load_model(path, model)"
    name = described.get("name")
    if name is None:
        raise UserError(f"{source} holds a {described.get('class')} that was not made by name; {remedy}")
    _check_is_registered(MODELS, name, described, source)
    try:
        with seeded(0), without_reading_weights():
            model: nn.Module = MODELS[name](**described["options"])
    except Exception as error:
        raise UserError(f"the model '{name}' of {source} cannot be made again: {reason_of(error)}; {remedy}") from error
    return model


def method_made_again(described: Mapping[str, Any], model: nn.Module, source: Path) -> Method:
    """A method from what `describe_method` gave, of a model, without its own state.

    Raises:
        UserError: it was made with something that a file cannot hold, or cannot be made here; the message names the file.
    """
    kind, name = described.get("class"), described.get("name")
    remedy = f"pass load_model(path, method=lambda model: {kind}(model, ...)), made as it was for training"
    if described.get("unsaved"):
        raise UserError(
            f"the {kind} of {source} was made with {', '.join(described['unsaved'])}, which a file cannot hold; {remedy}"
        )
    if name is None:
        raise UserError(f"{source} holds a {kind}, which is not in METHODS; {remedy}")
    _check_is_registered(METHODS, name, described, source)
    try:
        options = dict(described["options"])
        for option, loss in described["losses"].items():
            constructor = LOSSES[loss["name"]]
            with seeded(0):
                options[option] = constructor(**with_nested_components(constructor, loss["options"]))
        for option, inner in described["methods"].items():
            options[option] = [method_made_again(one, model, source) for one in inner]
        method: Method = METHODS[name](model, **options)
        method.name = described["title"]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the {kind} of {source} cannot be made again: {reason_of(error)}; {remedy}") from error
    return method


def _check_is_registered(registry: Registry, name: str, described: Mapping[str, Any], source: Path) -> None:
    if name not in registry:
        raise UserError(
            f"{source} holds the {registry.kind} '{name}', which nobody has registered; import {described.get('module')}, "
            "which registers it, first"
        )


def _as_json(value: Any) -> Any:
    """The value as JSON, in which paths are texts and tuples lists; None if it is none."""
    try:
        return json.loads(json.dumps(value, default=_path_as_text, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"an object of type {type(value).__name__} is no JSON")
