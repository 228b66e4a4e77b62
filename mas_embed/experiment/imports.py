"""Modules of the user that register components."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from mas_embed.errors import UserError, reason_of


def import_modules(names: Iterable[str] | None, *, given_by: str = "--import") -> None:
    """Imports modules that register components, from the working directory or an installed package.

    Args:
        names: of the modules; None for none.
        given_by: where they are named, for messages.

    Raises:
        UserError: one cannot be imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    for name in names or ():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UserError(f"cannot import '{name}', given by {given_by}: {reason}") from None
