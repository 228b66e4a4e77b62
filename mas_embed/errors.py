"""Errors that speak to the user: what can be put right before a run, and what went wrong in one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that was given cannot be used; one sentence says what was given, what is accepted, what to do.

    The command line prints the sentence and exits with code 2.
    """


class RunError(RuntimeError):
    """A run that was set up well has failed, as when training diverges; the command line exits with code 1."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """A `UserError` for a name that is not known, naming the nearest known one.

    >>> unknown_name("method", "maas", ["finetune", "mas"])
    UserError("unknown method 'maas': did you mean 'mas'? (known: finetune, mas)")
    """
    names = sorted(map(str, known))
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    return UserError(f"unknown {kind} '{name}': {hint}(known: {', '.join(names)})")
