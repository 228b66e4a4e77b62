"""The options of a component in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from mas_embed.config.options import constructor_parameters
from mas_embed.config.resolve import PASSED_TO, PROVIDED_TO
from mas_embed.data import DATASETS


def described_options(constructor: Callable[..., Any], kind: str) -> list[list[str]]:
    """By option of a component its name, its default and its type, as rows of a table.

    Args:
        constructor: of the component.
        kind: of the component, such as "method".
    """
    return [
        [option, _default(option, parameter, kind), _type(parameter)]
        for option, parameter in constructor_parameters(constructor).items()
        if option not in PASSED_TO.get(kind, ())
    ]


def _default(option: str, parameter: inspect.Parameter, kind: str) -> str:
    of_data = {name for data in DATASETS for name in DATASETS.provided_by(data)}
    if option in PROVIDED_TO.get(kind, set()) | of_data:
        return "filled in"
    return "required" if parameter.default is parameter.empty else repr(parameter.default)


def _type(parameter: inspect.Parameter) -> str:
    """The type as it is written, without the names of modules."""
    if parameter.annotation is parameter.empty:
        return ""
    return re.sub(r"\b(\w+\.)+(?=\w)", "", inspect.formatannotation(parameter.annotation))
