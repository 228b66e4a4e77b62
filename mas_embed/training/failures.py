"""What a training can fail of while it runs, as sentences that say what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mas_embed.errors import RunError, reason_of
from mas_embed.runtime.forward import is_out_of_memory
from mas_embed.training.recipe import Recipe

_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? (?P<pid>[\d, ]+)\) (?P<how>is killed by signal: \w+|exited)"
)


@contextmanager
def failures_explained(recipe: Recipe, split: str) -> Iterator[None]:
    """Makes a sentence of the two failures that come from the machine: memory that runs out, and a worker that is killed.

    Args:
        recipe: that the split is trained with.
        split: its name.

    Raises:
        RunError: one of the two has happened in the body.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError):
            raise
        sentence = _out_of_memory(error, recipe, split) or _dead_worker(error, recipe, split)
        if sentence is None:
            raise
        raise RunError(sentence) from error


def _out_of_memory(error: Exception, recipe: Recipe, split: str) -> str | None:
    if not is_out_of_memory(error):
        return None
    return (
        f"the memory is full in split '{split}' ({reason_of(error, 120)}): lower the batch size, which is {recipe.batch_size}, "
        f"and raise accumulate, which is {recipe.accumulate}, by the same factor; or train at a lower precision, or a smaller "
        "model"
    )


def _dead_worker(error: Exception, recipe: Recipe, split: str) -> str | None:
    found = _DEAD_WORKER.search(str(error))
    if found is None:
        return None
    how = "was killed" if "killed" in found["how"] else "ended"
    return (
        f"one of the {recipe.num_workers} processes that load the batches of split '{split}' {how} (process {found['pid']}), "
        "often because the memory is full: lower num_workers, or set it to 0, and resume; the results are the same"
    )
