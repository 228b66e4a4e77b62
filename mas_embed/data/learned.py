"""Splits that a model has learned: what is remembered of them, so that training goes on when their data is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mas_embed.data.image_preprocessing import ImagePreprocessing, image_preprocessing
from mas_embed.data.split import Split, SplitSequence
from mas_embed.errors import UserError


@dataclass(frozen=True)
class LearnedSplits:
    """The splits that a model has learned, as far as it matters to those that follow. It holds none of their items.

    Data sets with an option `learned`, such as `image_folders`, number the labels of new splits after these labels, give a
    class that comes back its old label, and stand up for a split whose data is gone, see `missing_split`.

    Attributes:
        names: of the splits, in the order in which they were learned.
        label_names: for each name of a label the labels that have it; empty where labels have no names.
        num_classes: 1 + the largest label that was trained on.
        preprocessing: how their images became inputs of the model; None for other inputs.
    """

    names: list[str] = field(default_factory=list)
    label_names: dict[str, list[int]] = field(default_factory=dict)
    num_classes: int = 0
    preprocessing: ImagePreprocessing | None = None

    @classmethod
    def of(cls, splits: Sequence[Split]) -> LearnedSplits:
        """What is to be remembered of some splits, and of those that were learned before them."""
        sequence = splits if isinstance(splits, SplitSequence) else SplitSequence(splits)
        preprocessing = None if sequence.learned is None else sequence.learned.preprocessing
        parts = [part for split in splits for part in (split.query, split.train) if len(part)]
        if parts and preprocessing is None:
            preprocessing = image_preprocessing(parts[0].inputs, sequence.normalization)
        return cls(
            [split.name for split in splits],
            {name: list(labels) for name, labels in sequence.label_names.items()},
            num_classes(splits),
            preprocessing,
        )

    def followed_by(self, later: LearnedSplits) -> LearnedSplits:
        """These splits and others that were learned after them."""
        label_names = dict(self.label_names)
        for name, labels in later.label_names.items():
            label_names[name] = list(dict.fromkeys([*label_names.get(name, []), *labels]))
        return LearnedSplits(
            [*self.names, *(name for name in later.names if name not in self.names)],
            label_names,
            max(self.num_classes, later.num_classes),
            self.preprocessing or later.preprocessing,
        )

    @classmethod
    def from_json(cls, value: Any, *, source: str) -> LearnedSplits:
        """The learned splits in a file.

        Raises:
            UserError: the value does not describe any; the message names the `source`.
        """
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValidationError:
            raise UserError(f"{source} is damaged: it does not say which splits were learned") from None

    def numbers(self) -> dict[str, int]:
        """By name of a label its number, for a data set that goes on numbering labels where this one ended.

        Raises:
            UserError: the labels are not numbered 0, 1, ... with a name each.
        """
        found = {name: labels[0] for name, labels in self.label_names.items() if len(labels) == 1}
        if len(found) < len(self.label_names) or sorted(found.values()) != list(range(len(found))):
            raise UserError(
                "the labels of the learned splits are not numbered 0, 1, ...; read the data as it was read then"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)


def num_classes(splits: Sequence[Split]) -> int:
    """1 + the largest label that is trained on, also in splits that were learned and are gone."""
    earlier = splits.learned.num_classes if isinstance(splits, SplitSequence) and splits.learned is not None else 0
    labels = [split.train.labels for split in splits if len(split.train)]
    return max([earlier, *(1 + int(of_split.max()) for of_split in labels)])
