"""Exit codes of a program that is stopped by a signal, as shells expect them. Imports nothing, so that it works at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(BaseException):
    """The process was told to end, by SIGTERM."""


@contextmanager
def exit_codes_of_signals() -> Iterator[None]:
    """Ends the program with one sentence and code 130 for Ctrl-C, 143 for SIGTERM, whatever it is doing at the time.

    Afterwards SIGTERM is handled as it was before.
    """

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)
    except Terminated:
        _exit("terminated", TERMINATED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(sentence: str, code: int) -> None:
    print(sentence, file=sys.stderr)
    sys.exit(code)
