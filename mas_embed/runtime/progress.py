"""Progress bars around loops over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def with_progress(batches: Iterable[Any], description: str | None) -> Iterable[Any]:
    """Iterates over the batches and shows a progress bar with a description; None shows no bar."""
    if description is None:
        return batches
    from rich.progress import track

    return track(batches, description=description, transient=True)


@contextmanager
def progress_bar(description: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in the body of the `with` statement; yields the function that advances it. None shows no bar."""
    if description is None:
        yield lambda number: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda number: progress.advance(task, number)
