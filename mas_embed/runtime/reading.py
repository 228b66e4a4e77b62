"""Reading files that users name: what cannot be read is refused in one sentence that names the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mas_embed.errors import UserError
from mas_embed.runtime.text import printable


def check_regular_file(path: str | Path, what: str) -> None:
    """Raises `UserError` unless there is a regular file, which is never waited for, as a pipe or a device would be.

    Args:
        path: of the file.
        what: is in it, for the message: "the config".
    """
    with read_errors_explained(path, what):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise UserError(f"cannot read {what} {path}: it is {kind}, not a file")


def read_text(path: str | Path, what: str) -> str:
    """The content of a UTF-8 file.

    Raises:
        UserError: it is not there, is no regular file, or is no text.
    """
    check_regular_file(path, what)
    with read_errors_explained(path, what):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, or nested too deeply
        raise UserError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def read_errors_explained(path: str | Path, what: str) -> Iterator[None]:
    """Raises the errors of the operating system, and of text that is no UTF-8, as `UserError`."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"cannot read {what} {path}: not a text file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {printable(str(path))}: {reason}") from None
