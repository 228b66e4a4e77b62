"""The contract of an evaluator, and what one evaluation gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from mas_embed.data import Split
from mas_embed.errors import UserError
from mas_embed.evaluation.recording import Observations
from mas_embed.registry import Registry
from mas_embed.runtime.json_text import null_for_nonfinite

EVALUATORS = Registry("evaluator")

BEFORE_FIRST = -1  # the split index of the evaluation before anything is learned


@dataclass(frozen=True)
class Evaluation:
    """How well a model knows each split, at one point of a sequence.

    Attributes:
        scores: by metric the scores [S] of the splits, higher is better; NaN for a split that was not evaluated.
        pooled: by metric one score over the items of all splits together.
        details: a dataclass that the evaluator defines for its further findings. It is made of numbers, texts, None, lists
            and dicts, so that it can be written as JSON. The report shows the fields `stale_gallery`, `index_update` and
            `tracked`, see `RetrievalDetails` and `TrackedDetails`.
    """

    scores: dict[str, list[float]]
    pooled: dict[str, float]
    details: Any = None

    @property
    def details_as_dict(self) -> dict[str, Any]:
        """The details as JSON, where NaN is None; empty without any."""
        return {} if self.details is None else null_for_nonfinite(asdict(self.details))


@dataclass(frozen=True)
class TrackedDetails:
    """Details of an evaluator that tracks subsets of the data.

    Attributes:
        tracked: by name of the subset its score.
    """

    tracked: dict[str, float]


class Evaluator(Protocol):
    """Measures how well a model knows the splits of a sequence: before the first is learned, and after each.

    An evaluator may also have a method `check`, see `CheckSplits`, a method `without_details`, see `HasDetails`, and a method
    `observations`, see `HasObservations`.

    Where the held-out items of splits that were learned before are gone, an evaluator is given the other splits, and the index
    of a split among these. What it remembers of a split it should therefore remember by the split's name.
    """

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Called before a split is learned, with the model as it was last evaluated.

        Args:
            model: that is trained.
            splits: that are evaluated.
            split_index: of the split that is learned next.
        """
        ...

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """Measures the model as it is.

        Args:
            model: that is trained.
            splits: that are evaluated.
            split_index: of the split that was learned last; `BEFORE_FIRST`, -1, before the first, where a new sequence
                begins and nothing of an earlier one may be remembered. Where `train_sequence` evaluates other splits than it
                trains (`evaluate_on`), all of them count as learned after each split, and it is the index of the last.
        """
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """What the evaluator remembers from split to split, for checkpoints: tensors, numbers, texts and dicts of them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`; refuses that of an evaluator with other settings."""
        ...


def check_same_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `UserError` if a state, of which the settings are a part, is of an evaluator with other settings."""
    for name, value in settings.items():
        if state.get(name) != value:
            raise UserError(f"the state is of an evaluator with {name} {state.get(name)}, but this one has {value}")


@runtime_checkable
class CheckSplits(Protocol):
    """An evaluator that can check before training whether it can evaluate some splits."""

    def check(self, splits: Sequence[Split]) -> Collection[str] | None:
        """The names of the metrics that it will give, or None if only an evaluation shows them; refuses unusable splits."""
        ...


def check_evaluable(evaluator: Evaluator, splits: Sequence[Split]) -> Collection[str] | None:
    """The names of the metrics of an evaluator; None if only an evaluation shows them.

    Raises:
        UserError: the evaluator has a `check` and refuses the splits.
    """
    return evaluator.check(splits) if isinstance(evaluator, CheckSplits) else None


@runtime_checkable
class HasDetails(Protocol):
    """An evaluator that can do without its details, which cost time."""

    def without_details(self) -> Evaluator:
        """An evaluator that gives the same scores, and no details."""
        ...


def without_details(evaluator: Evaluator) -> Evaluator:
    """The evaluator without its details, where it can do without, for trainings of which only the scores count."""
    return evaluator.without_details() if isinstance(evaluator, HasDetails) else evaluator


@runtime_checkable
class HasObservations(Protocol):
    """An evaluator that records what a report shows beside the scores: neighbours of queries, classes, embeddings."""

    def observations(self) -> Observations | None:
        """What it has recorded since the first evaluation of the sequence; None if there is nothing."""
        ...


def observations_of(evaluator: Evaluator) -> Observations | None:
    """What an evaluator has recorded for the report; None if it records nothing."""
    return evaluator.observations() if isinstance(evaluator, HasObservations) else None
