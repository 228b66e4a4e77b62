"""The two kinds of error that users meet, and the context managers that make a sentence of any other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MOST_NAMES = 40  # that a message lists; of more it lists the nearest
_NUM_NEAREST = 8
_LONGEST_NAME = 100


class UserError(ValueError):
    """Something that was given cannot be used; one sentence says what was given, what is accepted, what to do.

    The command line prints the sentence and exits with code 2.
    """


class RunError(RuntimeError):
    """A run that was set up well has failed, as when training diverges; the command line exits with code 1."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """A `UserError` for an unknown name, which suggests the nearest known one; of many known names it lists the nearest.

    >>> unknown_name("method", "maas", ["finetune", "mas"])
    UserError("unknown method 'maas': did you mean 'mas'? (known: finetune, mas)")
    """
    text, names = str(name), sorted(map(str, known))
    given = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]} ..."
    nearest = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    listed = ", ".join(names)
    if len(names) > _MOST_NAMES:
        shown = difflib.get_close_matches(given, names, n=_NUM_NEAREST, cutoff=0)
        listed = f"{', '.join(shown)} and {len(names) - len(shown):,} more"
    return UserError(f"unknown {kind} {given!r}: {hint}(known: {listed})")


@contextmanager
def explained(config_key: str) -> Iterator[None]:
    """Turns any exception of its body into a `UserError` that names the config key whose component raised it.

    >>> with explained("training.optimizer"):
    ...     raise ValueError("Invalid learning rate: -1.0")
    Traceback (most recent call last):
    mas_embed.errors.UserError: training.optimizer does not work with these options: Invalid learning rate: -1.0
    """
    try:
        yield
    except RunError:
        raise
    except UserError as error:
        raise UserError(f"{config_key}: {error}") from None
    except Exception as error:
        raise UserError(f"{config_key} does not work with these options: {reason_of(error)}") from error


def reason_of(error: BaseException, limit: int = 300) -> str:
    """What an exception says, as one line of at most `limit` characters; its type where it says nothing.

    >>> reason_of(KeyError("width")), reason_of(ZeroDivisionError())
    ("KeyError 'width'", 'ZeroDivisionError')
    """
    words = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, KeyError):
        words = f"{name} {words}"
    return f"{words[:limit]} ..." if len(words) > limit else words or name


@contextmanager
def raised_by(component: str) -> Iterator[None]:
    """Marks an exception of its body with the component that raised it, for `component_at_fault`; the innermost mark stays."""
    try:
        yield
    except Exception as error:
        if component_at_fault(error) is None:
            error.__dict__["mas_embed_component"] = component
        raise


def component_at_fault(error: Exception) -> str | None:
    """The component that `raised_by` has marked an exception with; None without a mark.

    >>> try:
    ...     with raised_by("loss"):
    ...         1 / 0
    ... except ZeroDivisionError as error:
    ...     component_at_fault(error)
    'loss'
    """
    return error.__dict__.get("mas_embed_component")
