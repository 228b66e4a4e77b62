"""The options of a component, checked against its constructor: a default lives in one place."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.mistakes import accepted_by, not_accepted

_PLAIN = (bool, int, float, str)


def resolve_options(
    where: str,
    constructor: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    given: Collection[str] = (),
    provided: Collection[str] = (),
    other_keys: Collection[str] = (),
) -> dict[str, Any]:
    """The options with every default of the constructor filled in that can be written in a config.

    Args:
        where: the component's key in the config, for messages: "model", "training.optimizer".
        constructor: the class or function that will be called with the options.
        options: as the user wrote them.
        given: parameters that the program always passes itself, which are no options.
        provided: parameters that the run fills in where the options leave them out; they stay out of the result then.
        other_keys: that may stand beside the options, for messages.

    Raises:
        UserError: an option that the constructor does not take, one of a wrong type, or a required one that is missing.
    """
    parameters = {name: p for name, p in constructor_parameters(constructor).items() if name not in given}
    for name in options:
        if name not in parameters:
            raise unknown_name(f"option of {where}", name, [*parameters, *other_keys])
    # A required parameter of a base class may be passed on by the subclass: the constructor will say if it is not
    inherited = parameters.keys() - inspect.signature(constructor).parameters.keys()
    resolved = {}
    for name, parameter in parameters.items():
        if name in options:
            resolved[name] = _checked(f"{where}.{name}", parameter, options[name])
        elif name in provided:
            continue
        elif parameter.default is parameter.empty and name not in inherited:
            raise UserError(f"{where} needs the option '{name}'; add {where}.{name} to the config")
        elif isinstance(parameter.default, tuple) and _is_plain(parameter.default):
            # YAML has lists only: the default in the form that it has once it is written and read again
            resolved[name] = _checked(f"{where}.{name}", parameter, list(parameter.default))
        elif _is_plain(parameter.default):
            resolved[name] = parameter.default
    return resolved


def constructor_parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor, with types resolved; behind `**kwargs`, those of the base classes too.

    Those that a class passes to its base class itself are left out.
    """
    functions = [constructor]
    if inspect.isclass(constructor):
        functions = [
            vars(base)["__init__"] for base in constructor.__mro__ if "__init__" in vars(base) and base is not object
        ]
    found: dict[str, inspect.Parameter] = {}
    settled = {"self"}
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        types = _types(function)
        for parameter in parameters:
            is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if is_named and parameter.name not in settled:
                found.setdefault(
                    parameter.name, parameter.replace(annotation=types.get(parameter.name, parameter.empty))
                )
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
        settled |= _names_given_to_base(function)
    return found


def _names_given_to_base(function: Callable[..., Any]) -> set[str]:
    """The parameters of the base class that `super().__init__(name=...)` in a constructor sets, so that nobody else may.

    Those that the constructor takes out of its own keywords, by `kwargs["name"]`, are not among them.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source
        return set()
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    to_base = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"]
    keys = [node.slice for node in nodes if isinstance(node, ast.Subscript)]
    own = {key.value for key in keys if isinstance(key, ast.Constant)}
    return {keyword.arg for call in to_base for keyword in call.keywords if keyword.arg is not None} - own


def component_lists(constructor: Callable[..., Any], kind: type) -> list[str]:
    """The parameters of a constructor that take several components of one kind, annotated `Sequence[kind]`."""
    parameters = constructor_parameters(constructor).items()
    return [name for name, parameter in parameters if typing.get_args(parameter.annotation) == (kind,)]


def _types(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _checked(where: str, parameter: inspect.Parameter, value: Any) -> Any:
    expected = parameter.annotation
    if expected is parameter.empty:
        if type(parameter.default) not in (bool, int, float):
            return value  # nothing is known of its type; the constructor will tell
        expected = bool if isinstance(parameter.default, bool) else float
    try:
        checked = TypeAdapter(
            expected, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        ).validate_python(value)
    except ValidationError as error:
        raise not_accepted(where, value, accepted_by(error.errors())) from None
    except (PydanticSchemaGenerationError, SchemaError, TypeError):  # a type that pydantic cannot check
        return value
    if _became_a_number(value, checked):
        raise not_accepted(where, value, "it must be a number, not true, false or a text in quotes")
    # An integer stays one where a float is accepted, so that the resolved config reads as it was written
    return value if isinstance(value, int) and isinstance(checked, float) else checked


def _became_a_number(value: Any, checked: Any) -> bool:
    """Whether pydantic has read a text or a boolean as a number, in the value or in an entry of it."""
    if isinstance(value, list) and isinstance(checked, Sequence):
        return any(map(_became_a_number, value, checked))
    if isinstance(value, Mapping) and isinstance(checked, Mapping):
        return any(map(_became_a_number, value.values(), checked.values()))
    is_number = isinstance(checked, int | float) and not isinstance(checked, bool)
    return is_number and isinstance(value, bool | str)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, _PLAIN)
