"""Libraries that are installed only by those who use them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mas_embed import UserError


def require(library: str, *, extra: str) -> ModuleType:
    """The module of a library.

    Raises:
        UserError: it is not installed; the message names the extra of this package that installs it.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(
            f"this needs {library}, which cannot be imported ({error}); install it with pip install 'mas-embed[{extra}]'"
        ) from error
