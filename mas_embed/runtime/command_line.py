"""The console that the command line prints to, and the command that it was started with, as a user would type it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from mas_embed.runtime.text import printable


class PipedConsole(Console):
    """A console whose output may end early, as in `mas-embed run ... | head`: the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())


def plain(text: str) -> str:
    """Text of unknown origin as it is to be shown, neither markup nor commands to the terminal."""
    return escape(printable(text))


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
