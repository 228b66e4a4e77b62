"""Ctrl-C and SIGTERM while trainings run in other processes of this machine: they store where they stand before they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mas_embed.runtime.signals import Terminated

_SECONDS_TO_STORE = 30  # then the processes are killed
_SECONDS_BETWEEN_LOOKS = 0.05


@contextmanager
def stored_before_the_end() -> Iterator[str]:
    """In the body of the `with` statement, a signal is passed on to joblib's processes and waits until they have stored.

    A second signal does not wait. Does nothing outside the main thread, where signals cannot be handled.

    Yields:
        The folder through which the processes tell that they train, for `stoppable`.
    """
    with tempfile.TemporaryDirectory(prefix="mas-embed-") as folder:
        if threading.current_thread() is not threading.main_thread():
            yield folder
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def pass_on(number: int, _: FrameType | None) -> None:
            for one, handler in before.items():
                signal.signal(one, handler)
            _stop_workers(Path(folder))
            signal.raise_signal(number)

        try:
            for one in before:
                signal.signal(one, pass_on)
            yield folder
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def _stop_workers(folder: Path) -> None:
    """Sends SIGTERM to the processes that train, and waits until none does."""
    workers = {child.pid for child in multiprocessing.active_children() if child.name.startswith("LokyProcess")}
    training = {int(path.name) for path in folder.iterdir()} & workers
    for worker in training:
        os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_STORE
    while time.monotonic() < deadline and any((folder / str(worker)).exists() for worker in training):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextmanager
def stoppable(folder: str) -> Iterator[None]:
    """Lets SIGTERM end the body of the `with` statement in a process of joblib, which then waits to be killed by its parent.

    If the process ended by itself, joblib would kill the others at once, before they have stored.

    Args:
        folder: from `stored_before_the_end`.
    """

    def terminate(*_: object) -> None:
        raise Terminated

    mark = Path(folder) / str(os.getpid())
    try:
        signal.signal(signal.SIGTERM, terminate)
        mark.touch()
        yield
    except Terminated:
        mark.unlink(missing_ok=True)
        while True:
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mark.unlink(missing_ok=True)
