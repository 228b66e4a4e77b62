"""The mistakes that pydantic finds in a config or a file of results, in words for people who do not know pydantic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from mas_embed.errors import UserError
from mas_embed.runtime.text import printable, shortened

COMPONENT = "a component such as `mas` or `{name: mas, strength: 3}`"
SECTION = "a section of 'key: value' pairs"

# By type of the error what is accepted, which can refer to its context; "" for an object that a file cannot give
_ACCEPTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "callable_type": "",
    "dict_type": SECTION,
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "invalid_key": "a text",
    "is_instance_of": "",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": SECTION,
    "missing": "a list of more entries",
    "model_type": SECTION,
    "none_required": "null",
    "path_type": "a path",
    "sequence_str": "a list",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_long": "a text of at most {max_length} characters",
    "string_type": "a text",
    "string_unicode": "a text without broken characters",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
_COLLECTIONS = {"Sequence": "a list", "Iterable": "a list", "Collection": "a list", "Mapping": SECTION}
_COMPONENTS = ("Component", "MethodSection", "EvaluationSection")


def not_accepted(where: str, value: Any, accepted: str) -> UserError:
    """The error that a value of a config is not what is accepted.

    >>> not_accepted("seeds", 3, "it must be a list")
    UserError('seeds=3 is not accepted: it must be a list')
    """
    return UserError(f"{shortened(printable(where))}={shortened(repr(value))} is not accepted: {accepted}")


def accepted_by(errors: Iterable[ErrorDetails]) -> str:
    """What would be accepted instead of a value, as "it must be a text or a whole number".

    Args:
        errors: all that pydantic reports of one value, one for each alternative of its type. The location of an error begins
            at the value.
    """
    errors = list(errors)
    found = dict.fromkeys(map(_accepted_instead, errors))
    words = list(filter(None, found)) or ["an object of Python, which a file cannot give"]
    subject = "it"
    if any("[key]" in error["loc"] for error in errors):
        subject = "every key"
    elif any(isinstance(key, int) and error["type"] != "missing" for error in errors for key in error["loc"]):
        subject = "every entry"
    return f"{subject} must be {' or '.join(words)}"


def _accepted_instead(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "is_instance_of" and context["class"] in _COLLECTIONS:
        return _COLLECTIONS[context["class"]]
    if error["type"] == "model_type" and context["class_name"] in _COMPONENTS:
        return COMPONENT
    if error["type"] in _ACCEPTED:
        return _ACCEPTED[error["type"]].format_map(context)
    return f"something else ({error['msg']})"
