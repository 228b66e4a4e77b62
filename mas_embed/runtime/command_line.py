"""The command that this program was started with, as a user would type it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def command_of(argv: Sequence[str]) -> str:
    """The command as it was typed, without the path of the program.

    >>> command_of(["/usr/bin/mas-embed", "run", "my config.yaml"])
    "mas-embed run 'my config.yaml'"
    """
    program = ["mas-embed"] if Path(argv[0]).stem == "mas-embed" else ["python", "-m", "mas_embed"]
    return shlex.join([*program, *argv[1:]])


def resuming_command(argv: Sequence[str]) -> str:
    """The command that goes on where one was stopped.

    Args:
        argv: the program and its arguments, as in `sys.argv`.

    >>> resuming_command(["/usr/bin/mas-embed", "run", "my config.yaml", "--overwrite"])
    "mas-embed run 'my config.yaml' --resume"
    """
    return command_of([*(argument for argument in argv if argument not in ("--overwrite", "--resume")), "--resume"])
