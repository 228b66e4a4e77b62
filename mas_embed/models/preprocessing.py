"""Which colours a model of a config wants, known before the model is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mas_embed.registry import Registry
from mas_embed.runtime.preprocessing import Preprocessing, check_preprocessing

# By the name of a model a function that takes some of the model's options and returns a `Preprocessing`, or None where the
# model, under these options, has no weights that ask for one
PREPROCESSING = Registry("preprocessing")


def preprocessing_of(model: str, options: Mapping[str, Any]) -> Preprocessing | None:
    """The normalization of colours that the weights of a model want; None for a model that names none.

    Args:
        model: its name in `MODELS`.
        options: of its constructor; the function that is registered in `PREPROCESSING` under the model's name is given those
            that it has a parameter for.

    Raises:
        UserError: the registered function refuses the options, or what it returns is no `Preprocessing`.

    Examples:
        >>> preprocessing_of("small_conv", {})
    """
    if model not in PREPROCESSING:
        return None
    function = PREPROCESSING[model]
    names = inspect.signature(function).parameters
    preprocessing = function(**{name: value for name, value in options.items() if name in names})
    if preprocessing is None:
        return None
    preprocessing = Preprocessing(*(tuple(map(float, values)) for values in preprocessing))
    check_preprocessing(preprocessing)
    return preprocessing
