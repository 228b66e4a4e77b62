"""Checks of single arguments, which raise an error that names the argument and the values that it accepts."""

from __future__ import annotations

from collections.abc import Sequence

from mas_embed.errors import UserError


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
    """Raises `UserError` unless the value is at least `minimum`."""
    if not value >= minimum:
        raise UserError(f"{option} must be at least {minimum:g}, got {value}")


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raises `UserError` unless the value is in [low, high]."""
    if not low <= value <= high:
        raise UserError(f"{option} must be from {low:g} to {high:g}, got {value}")
