"""JSON text in which NaN and infinite numbers are null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Numbers, strings, lists and mappings as JSON text. JSON has no NaN and no infinity; they are written as null.

    >>> json_text({"scores": [0.5, float("nan")]})
    '{"scores": [0.5, null]}'
    """
    return json.dumps(null_for_nonfinite(value), indent=indent, allow_nan=False)


def null_for_nonfinite(value: Any) -> Any:
    """A value as JSON has it: None for NaN and infinite numbers, lists for tuples, within lists and mappings, too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: null_for_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nonfinite(inner) for inner in value]
    return value
