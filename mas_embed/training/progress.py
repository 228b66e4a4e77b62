"""What a sequence has recorded so far, and how it goes on from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from mas_embed.data import Split
from mas_embed.errors import UserError
from mas_embed.evaluation import Details, Evaluation, Evaluator, ScoreMatrix
from mas_embed.methods import Method
from mas_embed.training.checkpoint import REMEDY, has_checkpoint, load_states, read_last_checkpoint
from mas_embed.training.plan import check_plan
from mas_embed.training.result import SequenceResult
from mas_embed.training.step import Stopwatch


@dataclass
class Progress:
    """What has been recorded so far; goes into the checkpoint as JSON."""

    initial: dict[str, list[float]] = field(default_factory=dict)
    scores: list[dict[str, list[float]]] = field(default_factory=list)
    pooled: dict[str, float] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: Stopwatch().seconds)

    @classmethod
    def read(cls, stored: Mapping[str, Any], *, source: Path) -> Progress:
        """The progress in a checkpoint.

        Raises:
            UserError: it is not one.
        """
        try:
            progress = TypeAdapter(cls).validate_python({name: stored[name] for name in cls.__dataclass_fields__})
            TypeAdapter(list[Details]).validate_python(progress.details)
        except (ValidationError, KeyError):
            progress = cls()
        num_learned = len(progress.scores)
        sizes = {len(values) for row in (progress.initial, *progress.scores) for values in row.values()}
        is_whole = all(progress.scores) and progress.initial
        if not is_whole or len(progress.details) != num_learned or len(sizes) > 1 or len(progress.seconds) != 3:
            raise UserError(f"the checkpoint {source} is damaged; {REMEDY}")
        return progress

    def extend(self, num_splits: int) -> None:
        """Makes room for splits that were appended: their scores before were not measured."""
        for row in (self.initial, *self.scores):
            for values in row.values():
                values += [math.nan] * (num_splits - len(values))

    def record(self, evaluation: Evaluation) -> None:
        """Adds what was measured after a split."""
        self.scores.append(evaluation.scores)
        self.details.append(evaluation.details_as_dict)
        self.pooled = evaluation.pooled

    def as_result(self, splits: Sequence[Split], *, method: Method, seed: int) -> SequenceResult:
        """Everything as one result of a training with this method and seed on which these splits were evaluated."""
        metrics = [name for name in self.scores[0] if all(name in row for row in self.scores)]
        matrices = {name: ScoreMatrix([row[name] for row in self.scores]) for name in metrics}
        return SequenceResult(
            [split.name for split in splits],
            matrices,
            self.initial,
            self.pooled,
            self.details,
            self.num_steps,
            self.seconds,
            method=method.name,
            seed=seed,
            keeps=method.keeps,
            num_bytes=method.num_bytes,
            missing=[split.name for split in splits if not len(split.query)],
        )


@dataclass
class Resumed:
    """Where a sequence goes on.

    Attributes:
        progress: what has been recorded.
        plan: that is followed from there on.
        within_split: the state of `SplitTraining` in the middle of the next split; None at its start.
        callbacks: the states of the callbacks by name; None for a sequence that starts.
    """

    progress: Progress
    plan: dict[str, Any]
    within_split: Mapping[str, Any] | None = None
    callbacks: Mapping[str, Any] | None = None

    def take_within_split(self) -> Mapping[str, Any] | None:
        """The state within a split, the first time; then None."""
        taken, self.within_split = self.within_split, None
        return taken


def restore(
    checkpoint: Path | None,
    resume: bool,
    plan: Mapping[str, Any],
    model: nn.Module,
    method: Method,
    evaluator: Evaluator,
) -> Resumed:
    """Where a sequence stands.

    Args:
        checkpoint: the file; None for a sequence without.
        resume: whether to go on from the file, or the one before it, if it exists.
        plan: that the checkpoint must be of, see `make_plan`; it may have further splits.
        model: that the checkpoint's state is loaded into, like method and evaluator.
        method: of the sequence.
        evaluator: of the sequence.

    Raises:
        UserError: there is a checkpoint and `resume` is False; it is damaged, like the one before it, or of another sequence.
    """
    if checkpoint is None or not has_checkpoint(checkpoint):
        return Resumed(Progress(), dict(plan))
    if not resume:
        raise UserError(
            f"there is a checkpoint already at {checkpoint}; pass resume=True to go on from it, or another path"
        )
    states, stored = read_last_checkpoint(checkpoint)
    within_split, of_callbacks = states.get("within_split") or {}, states.get("callbacks") or {}
    if not isinstance(within_split, Mapping) or not isinstance(of_callbacks, Mapping):
        raise UserError(f"the checkpoint {checkpoint} is damaged; {REMEDY}")
    progress = Progress.read(stored, source=checkpoint)
    plan = check_plan(
        stored.get("plan"),
        plan,
        num_learned=len(progress.scores),
        is_within_split=bool(within_split),
        source=str(checkpoint),
    )
    if len(progress.scores) + bool(within_split) > len(plan["splits"]):
        raise UserError(f"the checkpoint {checkpoint} is damaged; {REMEDY}")
    load_states(states, model, method, evaluator, source=checkpoint)
    progress.extend(len(plan["evaluated_splits"]))
    return Resumed(progress, plan, within_split or None, of_callbacks)
