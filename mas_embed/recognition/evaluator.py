"""The evaluator recognition: the accuracy of every split, by the head of the split and by all heads together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mas_embed.data import Split, check_splits
from mas_embed.errors import UserError
from mas_embed.evaluation import (
    BEFORE_FIRST,
    EVALUATORS,
    NONE,
    NUM_NEIGHBOURS,
    Described,
    Evaluation,
    Found,
    Observations,
    Recorder,
    check_same_settings,
    embed_part,
)
from mas_embed.recognition.heads import check_labels, check_scores, split_of_classes, without_other_heads
from mas_embed.runtime.checks import as_whole_number

RECOGNITION_METRICS = ("accuracy", "accuracy_all_heads")


@dataclass(frozen=True)
class RecognitionDetails:
    """What is found beside the accuracies.

    Attributes:
        class_accuracy: by split, by class, the share of its held-out images that the head of the split recognises; None unless
            it is asked for.
        own_gallery: the accuracy of the splits learned so far among their own classes, by the name of the metric that it is
            compared with; None before the first split is learned.
        all_galleries: likewise, among the classes of all splits.
    """

    class_accuracy: dict[str, dict[str, float]] | None = None
    own_gallery: dict[str, list[float]] | None = None
    all_galleries: dict[str, list[float]] | None = None


class _Seen(NamedTuple):
    """What was seen of N held-out images of a split.

    Attributes:
        correct: by metric whether each image is classified correctly [N].
        reciprocal_rank: [N] of the true class among those of its split.
        top: [q, K] the classes of the split with the highest scores, of the recorded images; -1 where it has fewer.
        shares: [q, K] their probabilities among these classes; NaN where there is none.
    """

    correct: dict[str, Tensor]
    reciprocal_rank: Tensor = torch.empty(0)
    top: Tensor = torch.empty(0)
    shares: Tensor = torch.empty(0)


@EVALUATORS.register("recognition")
class RecognitionEvaluator:
    """The share of the held-out images (`Split.query`) whose class has the highest score.

    - `accuracy`: among the classes of the image's own split. Which split an image is from is known, as in the experiments of
      Aljundi et al. (2018).
    - `accuracy_all_heads`: among the classes of all splits of the sequence, also of those that are not learned yet; which
      split an image is from is not known.

    Of classes with equal scores the first one counts. Pooled scores are over the images of all splits, each of which counts
    equally, so that large splits count more; the final average counts every split equally. The forgetting of a split in the
    code of Aljundi et al. is its accuracy when it was learned, less that in the end: the mean over all splits but the last
    is the negative of `backward_transfer`, see `ScoreMatrix`.

    Args:
        classes_per_split: the number of classes of each split, in order; the data set provides it.
        class_names: the names of the classes of each split; None for their labels. The data set provides it.
        by_class: whether the details hold the accuracy of every class.
        recorded_queries: the number of held-out images of a split, at most, whose predictions are recorded for the report; 0 to
            record nothing.
        batch_size: number of images that are classified at once.

    Raises:
        UserError: a number is below 1, or the names do not fit the numbers of classes or are not distinct in a split.
    """

    def __init__(
        self,
        classes_per_split: Sequence[int],
        *,
        class_names: Sequence[Sequence[str]] | None = None,
        by_class: bool = False,
        recorded_queries: int = 256,
        batch_size: int = 256,
    ) -> None:
        self.split_of_class = split_of_classes(classes_per_split)
        self.classes_per_split = list(classes_per_split)
        self.batch_size, self.by_class = as_whole_number("batch_size", batch_size, 1), by_class
        if class_names is None:
            class_names = [
                [str(label) for label in range(len(self.split_of_class)) if self.split_of_class[label] == index]
                for index in range(len(classes_per_split))
            ]
        if [len(set(names)) for names in class_names] != self.classes_per_split:
            raise UserError(
                f"class_names must hold, for every split, as many different names as it has classes ({classes_per_split})"
            )
        self.recorded_queries = as_whole_number("recorded_queries", recorded_queries, 0)
        described = Described("reciprocal rank of the true class", "probability", neighbour_kind="label")
        self._recorder = Recorder(self.recorded_queries, described)
        self._names = [name for names in class_names for name in names]

    def check(self, splits: Sequence[Split]) -> Collection[str]:
        """The names of the metrics.

        Raises:
            UserError: a part is empty, or a label is not one of the classes.
        """
        check_splits(splits)
        for split in splits:
            for part in (split.train, split.query):
                check_labels(part.labels, len(self.split_of_class), of=f"of split '{split.name}'")
        return RECOGNITION_METRICS

    def without_details(self) -> RecognitionEvaluator:
        """An evaluator with the same scores that does not count by class and records nothing."""
        return RecognitionEvaluator(self.classes_per_split, recorded_queries=0, batch_size=self.batch_size)

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Does nothing: nothing is compared with the model before the split."""

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """The accuracies of every split, and those pooled over all splits.

        Raises:
            UserError: `check` refuses the splits, the model does not give one score for every class, or a score is not finite.
        """
        self.check(splits)
        self._begin(splits, split_index)
        seen = [self._classify(model, split, index) for index, split in enumerate(splits)]
        counts = [len(split.query) for split in splits]
        sums = {metric: [int(one.correct[metric].sum()) for one in seen] for metric in RECOGNITION_METRICS}
        scores = {metric: [s / n for s, n in zip(values, counts, strict=True)] for metric, values in sums.items()}
        pooled = {metric: sum(values) / sum(counts) for metric, values in sums.items()}
        by_split = zip(splits, seen, strict=True)
        by_class = {split.name: self._by_class(one.correct["accuracy"], split.query.labels) for split, one in by_split}
        details = RecognitionDetails(by_class) if self.by_class else None
        if split_index != BEFORE_FIRST:
            self._record(splits, split_index, seen)
            own, of_all = (scores[metric][: split_index + 1] for metric in RECOGNITION_METRICS)
            all_galleries, own_gallery = {"accuracy": of_all}, {"accuracy_all_heads": own}
            details = RecognitionDetails(by_class if self.by_class else None, own_gallery, all_galleries)
        return Evaluation(scores, pooled, details)

    def observations(self) -> Observations | None:
        """What was recorded of the held-out images and of the classes; None without any."""
        return self._recorder.observations()

    def _begin(self, splits: Sequence[Split], split_index: int) -> None:
        """Draws the images that are recorded, anew at the start of a sequence."""
        if split_index == BEFORE_FIRST:
            self._recorder.forget()
        self._recorder.begin([split.query.labels for split in splits])

    def _record(self, splits: Sequence[Split], split_index: int, seen: Sequence[_Seen]) -> None:
        """Records the classes with the highest scores for a sample of images."""
        if not self._recorder.is_recording:
            return
        labels, probabilities = (torch.cat([getattr(one, name) for one in seen]).numpy() for name in ("top", "shares"))
        split_of_label = np.where(labels == NONE, NONE, self.split_of_class.numpy()[labels])
        found = Found(split_of_label, np.full_like(labels, NONE), labels, probabilities)
        reciprocal_ranks = torch.cat([one.reciprocal_rank for one in seen]).numpy()
        self._recorder.record(split_index, [split.query.labels for split in splits], reciprocal_ranks, found)

    def state_dict(self) -> dict[str, Any]:
        """The settings, and what was recorded."""
        return {**self._settings(), "recorder": self._recorder.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks the settings in the state, and restores what was recorded.

        Raises:
            UserError: the state is of an evaluator with other settings.
        """
        check_same_settings(state, self._settings())
        self._recorder.load_state_dict(state.get("recorder", {}))

    def _settings(self) -> dict[str, Any]:
        return {"classes_per_split": list(self.classes_per_split), "by_class": self.by_class}

    def _classify(self, model: nn.Module, split: Split, split_index: int) -> _Seen:
        """What the scores of all classes say about the held-out images of a split."""
        labels = split.query.labels
        scores = embed_part(model, split.query, batch_size=self.batch_size)
        check_scores(scores, len(self.split_of_class))
        if not bool(scores.isfinite().all()):
            raise UserError(f"the class scores of split '{split.name}' are not finite; lower the learning rate")
        of_own_head = without_other_heads(scores, labels, self.split_of_class)
        predicted = {"accuracy": of_own_head.argmax(1), "accuracy_all_heads": scores.argmax(1)}
        correct = {metric: classes == labels for metric, classes in predicted.items()}
        if not self._recorder.is_recording:
            return _Seen(correct)
        reciprocal_rank = 1 / (of_own_head >= of_own_head.gather(1, labels[:, None])).sum(1).double()
        sampled = of_own_head[torch.from_numpy(self._recorder.sample_of(split_index)).long()].double().softmax(1)
        shares, top = sampled.topk(min(NUM_NEIGHBOURS, sampled.shape[1]), dim=1)
        is_other = self.split_of_class[top] != split_index
        return _Seen(correct, reciprocal_rank, top.masked_fill(is_other, NONE), shares.masked_fill(is_other, torch.nan))

    def _by_class(self, correct: Tensor, labels: Tensor) -> dict[str, float]:
        """By the name of a class that occurs the share of its images that are classified correctly."""
        num_classes = len(self.split_of_class)
        totals, hits = labels.bincount(minlength=num_classes), labels[correct].bincount(minlength=num_classes)
        return {self._names[label]: int(hits[label]) / int(totals[label]) for label in torch.unique(labels).tolist()}
