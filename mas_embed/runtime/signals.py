"""Exit codes of a program that is stopped by a signal, as shells expect them. Imports nothing, so that it works at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


class DelayedSignals:
    """Ctrl-C and SIGTERM, noted instead of acted upon, so that a step can be finished and saved.

    Attributes:
        received: the number of the signal that was received; None for none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Those that are ignored stay so; None is a handler that Python has not set
        self._handlers = {
            number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)
        }

    def start(self) -> None:
        """From now on signals are noted; a second one acts at once."""
        for number in self._handlers:
            signal.signal(number, self._note)

    def stop(self) -> None:
        """From now on signals act as they did before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Lets the signal that was received act, if there is one."""
        if self.received is not None:
            number, self.received = self.received, None
            self.stop()
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.deliver()
        self.received = number


@contextmanager
def delayed_signals() -> Iterator[DelayedSignals]:
    """Delays Ctrl-C and SIGTERM to the end of the `with` statement, or until `deliver` is called; a second one acts at once.

    Only the main thread of a program can do so; elsewhere nothing is delayed.
    """
    delayed = DelayedSignals()
    if threading.current_thread() is threading.main_thread():
        delayed.start()
        try:
            yield delayed
        finally:
            delayed.stop()
        delayed.deliver()
    else:
        yield delayed


def ignore_signals(_: int) -> None:
    """Lets the parent of a worker process decide when it ends: a terminal sends Ctrl-C, and a cluster SIGTERM, to both."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _exit(sentence: str, code: int) -> None:
    print(sentence, file=sys.stderr)
    sys.exit(code)
