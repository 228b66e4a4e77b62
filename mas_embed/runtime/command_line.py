"""The command that this program was started with, as a user would type it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def resuming_command(argv: Sequence[str]) -> str:
    """The command that goes on where one was stopped.

    Args:
        argv: the program and its arguments, as in `sys.argv`.

    >>> resuming_command(["/usr/bin/mas-embed", "run", "my config.yaml", "--overwrite"])
    "mas-embed run 'my config.yaml' --resume"
    """
    program = ["mas-embed"] if Path(argv[0]).stem == "mas-embed" else ["python", "-m", "mas_embed"]
    arguments = [argument for argument in argv[1:] if argument not in ("--overwrite", "--resume")]
    return shlex.join([*program, *arguments, "--resume"])
