"""Libraries that are installed only by those who use them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mas_embed.errors import UserError


def require_library(name: str, *, extra: str) -> ModuleType:
    """The module of a library, which is imported now.

    Raises:
        UserError: it cannot be imported; the message names the extra of this package that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {name}, which cannot be imported ({error}); install it with pip install 'mas-embed[{extra}]'"
        ) from error
