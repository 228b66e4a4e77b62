"""Callbacks, and the events that a training passes to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mas_embed.evaluation import Evaluation
from mas_embed.registry import Registry
from mas_embed.runtime.atomic_files import write_errors_explained
from mas_embed.runtime.checks import as_whole_number, check_at_least
from mas_embed.runtime.json_text import json_text

if TYPE_CHECKING:
    from mas_embed.training.result import SequenceResult

CALLBACKS = Registry("callback")


@dataclass(frozen=True)
class Event:
    """Where a training stands.

    Attributes:
        method: the name of the method, `Method.name`.
        seed: of the training.
        split: the name of the split that is being learned.
        split_index: its position in the sequence, from 0.
        num_splits: the length of the sequence.
    """

    method: str
    seed: int
    split: str
    split_index: int
    num_splits: int


@dataclass(frozen=True)
class StepEnd(Event):
    """One batch was learned.

    Attributes:
        epoch: from 0, within the split.
        step: batches so far within the split, from 1.
        loss: of the batch, without penalties; a scalar on the model's device.
        penalty: the method's penalty on the parameters as they are after the step; a scalar on the model's device.
        learning_rate: of the first parameter group.
        gradient_norm: of all gradients together, those of the penalty included, before they are clipped; None where the
            gradients of several batches are added up and the optimizer has not stepped, or no callback wants it.
    """

    epoch: int
    step: int
    loss: Tensor
    penalty: Tensor
    learning_rate: float
    gradient_norm: Tensor | None = None


@dataclass(frozen=True)
class EpochEnd(Event):
    """One pass over a split has ended.

    Attributes:
        epoch: from 0, within the split.
        num_epochs: of the split.
        loss: the mean over the batches of the epoch, without penalties.
        penalty: the method's penalty on the parameters as they are now.
        learning_rate: that the epoch was trained with, of the first parameter group.
        num_batches: of the epoch.
    """

    epoch: int
    num_epochs: int
    loss: float
    penalty: float
    learning_rate: float
    num_batches: int


@dataclass(frozen=True)
class SplitEnd(Event):
    """A split was learned and the model evaluated.

    Attributes:
        evaluation: of the model after the split.
    """

    evaluation: Evaluation


@dataclass(frozen=True)
class RunEnd(Event):
    """The last split of a sequence was learned.

    Attributes:
        record: what `train_sequence` returns.
    """

    record: SequenceResult


class Callback:
    """The base class of callbacks: methods that are called when a batch, an epoch, a split or a run ends, and do nothing.

    A callback that keeps something, such as lines in a file, can override `state_dict` and `load_state_dict`. Checkpoints then
    hold its state, and a resumed training takes it back to where it was: everything that it was told after the checkpoint it
    is told again. It is told that a split has ended before the checkpoint is written, which then holds what it made of it.

    Attributes:
        wants_gradient_norm: whether `StepEnd.gradient_norm` is computed, which reads all gradients once more.
    """

    wants_gradient_norm = False

    def state_dict(self) -> dict[str, Any]:
        """What the callback has kept so far, as tensors, numbers, texts and dicts of them; empty for nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the callback back to a state; called once, before anything else, if a training is resumed."""

    def on_step_end(self, event: StepEnd) -> None:
        """Called after every batch, if it is overridden."""

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Called after every pass over a split, before the method consolidates."""

    def on_split_end(self, event: SplitEnd) -> None:
        """Called after every split, once the model is evaluated and the checkpoint written; before, if it has a state."""

    def on_run_end(self, event: RunEnd) -> None:
        """Called when the last split was learned."""

    def close(self) -> None:
        """Called when a training is over, also if it has failed; closes files and connections."""


class Callbacks(Callback):
    """Passes every event to several callbacks, in their order."""

    def __init__(self, callbacks: tuple[Callback, ...]) -> None:
        self._callbacks = callbacks
        self._listening_to_steps = [one for one in callbacks if type(one).on_step_end is not Callback.on_step_end]

    @property
    def wants_steps(self) -> bool:
        """Whether any of them overrides `on_step_end`, whose event costs a look at the penalty."""
        return bool(self._listening_to_steps)

    @property
    def wants_norms(self) -> bool:
        """Whether any of them wants the norm of the gradients."""
        return any(callback.wants_gradient_norm for callback in self._callbacks)

    def state_dict(self) -> dict[str, Any]:
        """The states of those that have one, by the name of their class; several of one class are numbered."""
        return {name: state for name, callback in self._by_name().items() if (state := callback.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes those back whose state is there."""
        for name, callback in self._by_name().items():
            if name in state:
                callback.load_state_dict(state[name])

    def with_state(self, has_state: bool) -> Callbacks:
        """Those that override `state_dict`, or those that do not."""
        return Callbacks(
            tuple(one for one in self._callbacks if (type(one).state_dict is not Callback.state_dict) is has_state)
        )

    def _by_name(self) -> dict[str, Callback]:
        names: dict[str, Callback] = {}
        for callback in self._callbacks:
            kind = type(callback).__name__
            names[f"{kind} {sum(name.startswith(f'{kind} ') for name in names) + 1}"] = callback
        return names

    def on_step_end(self, event: StepEnd) -> None:
        for callback in self._listening_to_steps:
            callback.on_step_end(event)

    def on_epoch_end(self, event: EpochEnd) -> None:
        for callback in self._callbacks:
            callback.on_epoch_end(event)

    def on_split_end(self, event: SplitEnd) -> None:
        for callback in self._callbacks:
            callback.on_split_end(event)

    def on_run_end(self, event: RunEnd) -> None:
        for callback in self._callbacks:
            callback.on_run_end(event)


class _LinesInAFile(Callback):
    """A callback that appends JSON lines to a file; those that were written after a checkpoint are removed on resuming."""

    _path: Path

    def state_dict(self) -> dict[str, Any]:
        """The length of the file, in bytes."""
        return {"num_bytes": self._path.stat().st_size if self._path.exists() else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Shortens the file to the length that it had."""
        num_bytes = as_whole_number("the length of a log in a checkpoint", state.get("num_bytes"), 0)
        if self._path.exists() and self._path.stat().st_size > num_bytes:
            with write_errors_explained(self._path):
                os.truncate(self._path, num_bytes)


class EpochLog(_LinesInAFile):
    """Appends a JSON line to a file for every epoch and every split.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def on_epoch_end(self, event: EpochEnd) -> None:
        values = {name: getattr(event, name) for name in ("epoch", "loss", "penalty", "learning_rate", "num_batches")}
        _append(self._path, {"event": "epoch", **_position(event), **values})

    def on_split_end(self, event: SplitEnd) -> None:
        _append(self._path, {"event": "split", **_position(event), "scores": event.evaluation.scores})


@CALLBACKS.register("step_log")
class StepLog(_LinesInAFile):
    """Appends a JSON line with loss, penalty and learning rate to `<folder>/steps.jsonl` for every n-th batch of a split.

    Args:
        folder: of the file; in a config, the folder of the run.
        every: n >= 1.

    Raises:
        UserError: `every` is below 1.
    """

    def __init__(self, folder: str | Path, *, every: int = 1) -> None:
        check_at_least("every", every, 1)
        self._path, self._every = Path(folder) / "steps.jsonl", every

    def on_step_end(self, event: StepEnd) -> None:
        if event.step % self._every == 0:
            values = {"loss": float(event.loss), "penalty": float(event.penalty), "learning_rate": event.learning_rate}
            _append(self._path, {**_position(event), "epoch": event.epoch, "step": event.step, **values})


def _position(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("split", "split_index", "num_splits")}


def _append(path: Path, values: dict[str, Any]) -> None:
    with write_errors_explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json_text(values) + "\n")
