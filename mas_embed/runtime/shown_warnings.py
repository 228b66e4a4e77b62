"""Warnings as a user of the command line reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def warnings_as_sentences(show: Callable[[str], None]) -> Iterator[None]:
    """In the body of the `with` statement, passes the text of every `UserWarning` to `show`, each text once.

    Warnings of other categories, which are for programmers, are shown as before.
    """
    seen: set[str] = set()

    def show_once(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if not issubclass(category, UserWarning):
            before(message, category, *args, **kwargs)
        elif str(message) not in seen:
            seen.add(str(message))
            show(str(message))

    with warnings.catch_warnings():
        before, warnings.showwarning = warnings.showwarning, show_once
        yield
