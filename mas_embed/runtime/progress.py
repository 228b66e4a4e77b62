"""Progress bars around loops over batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def with_progress(batches: Iterable[Any], description: str | None) -> Iterable[Any]:
    """Iterates over the batches and shows a progress bar with a description; None shows no bar."""
    if description is None:
        return batches
    from rich.progress import track

    return track(batches, description=description, transient=True)
