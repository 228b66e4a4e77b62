"""What a training can fail of while it runs, as sentences that say what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from mas_embed.errors import RunError, reason_of
from mas_embed.runtime.forward import is_out_of_memory
from mas_embed.training.recipe import Recipe

_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? (?P<pid>[\d, ]+)\) (?P<how>is killed by signal: \w+|exited)"
)


@contextmanager
def failures_explained(split: str, *, where: str, batch_size: str, num_workers: str) -> Iterator[None]:
    """Makes a sentence of the two failures that come from the machine: memory that runs out, and a worker that is killed.

    Args:
        split: its name.
        where: what the body does with the split, as in "training on".
        batch_size: what to do about the memory.
        num_workers: the number of processes that load items, by name.

    Raises:
        RunError: one of the two has happened in the body.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError):
            raise
        found = _DEAD_WORKER.search(str(error))
        if is_out_of_memory(error):
            raise RunError(
                f"the memory is full in {where} split '{split}' ({reason_of(error, 120)}): {batch_size}"
            ) from error
        if found is not None:
            how = "was killed" if "killed" in found["how"] else "ended"
            raise RunError(
                f"a process that loads items {how} in {where} split '{split}' (process {found['pid']}), often because the memory "
                f"is full: lower {num_workers}, or set it to 0, and resume; the results are the same"
            ) from error
        raise


def training_failures_explained(recipe: Recipe, split: str) -> AbstractContextManager[None]:
    """As `failures_explained`, of training on a split and consolidating."""
    return failures_explained(
        split,
        where="training on",
        batch_size=f"lower the batch size, which is {recipe.batch_size}, and raise accumulate, which is {recipe.accumulate}, by "
        "the same factor; or train at a lower precision, or a smaller model",
        num_workers=f"num_workers, which is {recipe.num_workers}",
    )


def evaluation_failures_explained(split: str) -> AbstractContextManager[None]:
    """As `failures_explained`, of evaluating the model after or before a split."""
    return failures_explained(
        split,
        where="the evaluation at",
        batch_size="lower the batch_size of the evaluator, or leave out what it measures beside the scores, such as follow_index",
        num_workers="num_workers of the evaluator",
    )
