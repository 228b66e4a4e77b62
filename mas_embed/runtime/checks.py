"""Checks of single arguments, which raise an error that names the argument and the values that it accepts."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real

from mas_embed.errors import UserError
from mas_embed.runtime.text import printable, shortened


def check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    """Raises `UserError` unless the value is one of the choices.

    >>> check_choice("order", "up", ["up", "down"])
    >>> check_choice("order", "left", ["up", "down"])
    Traceback (most recent call last):
    mas_embed.errors.UserError: order must be 'up' or 'down', got 'left'
    """
    if value not in choices:
        *first, last = [f"'{choice}'" for choice in choices]
        accepted = f"{', '.join(first)} or {last}" if first else last
        raise UserError(f"{option} must be {accepted}, got {value!r}")


def check_at_least(option: str, value: float, minimum: float) -> None:
    """Raises `UserError` unless the value is a finite number of at least `minimum`."""
    if not (_is_real(value) and value >= minimum):
        raise UserError(f"{option} must be at least {minimum:g}, got {shown(value)}")


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raises `UserError` unless the value is a number in [low, high]."""
    if not (_is_real(value) and low <= value <= high):
        raise UserError(f"{option} must be from {low:g} to {high:g}, got {shown(value)}")


def as_whole_number(option: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """The value, of Python or NumPy, as an int.

    Raises:
        UserError: it is no whole number (a boolean, a float or a string is none), or is out of range.

    >>> as_whole_number("size", 3, minimum=1)
    3
    >>> as_whole_number("size", 2.5, minimum=1)
    Traceback (most recent call last):
    mas_embed.errors.UserError: size must be a whole number >= 1, got 2.5
    """
    try:
        number = None if _is_boolean(value) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = None
    bounds = [f"{sign} {bound}" for sign, bound in ((">=", minimum), ("<=", maximum)) if bound is not None]
    if (
        number is None
        or number < (number if minimum is None else minimum)
        or number > (number if maximum is None else maximum)
    ):
        accepted = " ".join(["a whole number", " and ".join(bounds)]).strip()
        raise UserError(f"{option} must be {accepted}, got {shown(value)}")
    return number


def as_number(option: str, value: object) -> float:
    """The value, of Python or NumPy, as a float.

    Raises:
        UserError: it is no finite real number (a boolean or a string is none).

    >>> as_number("strength", 1)
    1.0
    >>> as_number("strength", "1")
    Traceback (most recent call last):
    mas_embed.errors.UserError: strength must be a finite number, got '1'
    """
    try:
        number = float(value) if _is_real(value) else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an int beyond the range of a float
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{option} must be a finite number, got {shown(value)}")
    return number


def shown(value: object) -> str:
    """A value as it is written in Python, as one line of at most 80 characters, for a message."""
    return shortened(" ".join(printable(repr(value)).replace("\\n", " ").split()), 80)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not _is_boolean(value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
