"""When the state within a split is stored, and what a training does about a signal and about numbers that are not finite."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mas_embed.errors import RunError, UserError
from mas_embed.runtime.checks import as_number, as_whole_number
from mas_embed.runtime.distributed import gather_numbers
from mas_embed.runtime.signals import DelayedSignals, delayed_signals
from mas_embed.training.callbacks import Event
from mas_embed.training.checkpoint import damage_explained
from mas_embed.training.split_training import SplitTraining

WORTH_STORING = 30.0  # seconds of training that are stored before a method consolidates, which may take long


@dataclass(frozen=True)
class CheckpointEvery:
    """How often a checkpoint is written within a split, whichever comes first.

    Attributes:
        minutes: since the last checkpoint; None for no limit.
        steps: batches since the last checkpoint; None for no limit.

    Raises:
        UserError: a number is out of range.
    """

    minutes: float | None = 5.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < as_number("minutes", self.minutes) < math.inf:
            raise UserError(f"the minutes between checkpoints must be greater than 0, or None, got {self.minutes}")
        if self.steps is not None:
            object.__setattr__(self, "steps", as_whole_number("the number of steps between checkpoints", self.steps, 1))


class SplitCheckpoints:
    """Stores the state of a training within one split, from time to time and when a signal asks the program to end.

    Args:
        save: writes a checkpoint with a state of `SplitTraining`; None for a training without checkpoints.
        every: how often.
        stored: the state to go on from; None to start the split.
    """

    def __init__(
        self,
        save: Callable[[Mapping[str, Any]], None] | None = None,
        every: CheckpointEvery = CheckpointEvery(),
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self._save, self._every, self._stored = save, every, stored
        self._signals: DelayedSignals | None = None
        self._can_be_stored: bool | None = None  # None: not known yet
        self._last_time, self._last_step = time.monotonic(), 0

    def restore(self, training: SplitTraining) -> bool:
        """Takes a training that was just made to the stored state; returns whether there is one."""
        if self._stored is None:
            return False
        with damage_explained("the state within the split, in the checkpoint,"):
            training.load_state_dict(self._stored)
        self._stored = None
        self._last_step = training.num_steps
        return True

    @contextmanager
    def delay_signals(self) -> Iterator[None]:
        """Delays signals to the end of the step, if there are checkpoints."""
        if self._save is None:
            yield
            return
        with delayed_signals() as self._signals:
            yield

    def between_steps(self, training: SplitTraining, event: Event) -> None:
        """Stores the state if it is due or a signal has come, which then acts, where the training can be left.

        Raises:
            RunError: a loss or a parameter is not finite; nothing is stored then.
        """
        if self._save is None or not training.can_be_left:
            return
        signals = self._signals
        # A signal may reach one process before the others, which would wait in the next step for those that have stopped
        is_stopping = any(gather_numbers(signals is not None and signals.received is not None))
        if (is_stopping or self._is_due(training)) and self._is_storable(training):
            self.check_finite(training, event)
            self._save(training.state_dict())
            self._last_time, self._last_step = time.monotonic(), training.num_steps
        if is_stopping and signals is not None:
            signals.deliver()

    def check_finite(self, training: SplitTraining, event: Event) -> None:
        """Raises `RunError` if a loss of the epoch so far, or a parameter, is not finite."""
        bad = training.first_bad_step() if len(training.losses) else None
        if bad is None and training.is_finite():
            return
        what = "a weight is not finite" if bad is None else f"the loss is {bad[1]}"
        step = training.num_steps if bad is None else bad[0]
        kept = "" if self._save is None else "; the checkpoint before that is kept"
        raise RunError(
            f"training diverged, {what} in split '{event.split}', epoch {training.epoch + 1}, step {step}: lower the learning "
            f"rate, or the strength{kept}"
        )

    def _is_due(self, training: SplitTraining) -> bool:
        seconds = time.monotonic() - self._last_time
        if training.epoch == training.learner.recipe.epochs and seconds >= WORTH_STORING:
            return True
        if self._every.minutes is not None and seconds >= 60 * self._every.minutes:
            return True
        return self._every.steps is not None and training.num_steps - self._last_step >= self._every.steps

    def _is_storable(self, training: SplitTraining) -> bool:
        """Whether the state can be stored; if not, a warning says why."""
        if self._can_be_stored is None:
            self._can_be_stored = True
            try:
                training.check_storable()
            except UserError as error:
                self._can_be_stored = False
                warnings.warn(
                    f"no checkpoint is written within a split, so one that is interrupted starts again: {error}",
                    stacklevel=2,
                )
        return self._can_be_stored
