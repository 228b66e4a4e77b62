"""Class means that are stored when a split was learned, what drift makes of them, and the accuracy by the nearest of them.

N training items of a split, Q queries, C classes, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mas_embed.data import Split
from mas_embed.errors import UserError
from mas_embed.retrieval import ClassMeans, DriftCompensation, class_means
from mas_embed.retrieval.nearest_mean import is_nearest_class_mean

STORED, COMPENSATED, RECOMPUTED = "ncm_accuracy", "ncm_accuracy_compensated", "ncm_accuracy_recomputed"
NCM_METRICS = (STORED, COMPENSATED, RECOMPUTED)


class StoredClassMeans:
    """The class means of the splits learned so far, from the training items of each split when it was learned.

    They are stored in two versions: as they were computed, and moved across every later split by `DriftCompensation`, which is
    fitted on the training items of that split, embedded before and after it. If a class is in several splits, its mean is
    weighted by its numbers of training items.

    Attributes:
        stored: by metric the means of the splits learned so far; empty before the first.
        splits: the names of the splits learned so far.
    """

    def __init__(self) -> None:
        self.stored: dict[str, ClassMeans] = {}
        self.splits: list[str] = []
        # A split and its training items, embedded by the weights before it
        self._before: tuple[int, Tensor] | None = None

    def begin_split(self, split_index: int, embeddings: Tensor) -> None:
        """Remembers the training items [N, D] of a split, embedded by the weights before it."""
        self._before = split_index, embeddings

    def check(self, learned: Sequence[Split]) -> None:
        """Raises `UserError` unless the splits learned so far are all there, with their training items."""
        names = [split.name for split in learned]
        if names[: len(self.splits)] != self.splits or not all(len(split.train) for split in learned):
            raise UserError(
                "class_means needs the training items of all splits learned so far, but those of some are missing; bring them "
                "back, or evaluate without class_means"
            )

    def end_split(self, learned: Sequence[Split], embeddings: Sequence[Tensor]) -> None:
        """Moves the means of the earlier splits, and adds those of the splits that were learned since the last call.

        Args:
            learned: all splits learned so far.
            embeddings: of their training items, [N, D] each, by the weights after the last.
        """
        if self.stored:
            self._compensate(embeddings)
        self._before = None
        added = list(zip(learned, embeddings, strict=True))[len(self.splits) :]
        new = [class_means(rows, split.train.labels) for split, rows in added]
        for name in self.stored or (STORED, COMPENSATED):
            earlier = [self.stored[name]] if name in self.stored else []
            self.stored[name] = reduce(ClassMeans.merged_with, [*earlier, *new])
        self.splits = [split.name for split in learned]

    def _compensate(self, embeddings: Sequence[Tensor]) -> None:
        """Adds the drift to the compensated means; where it was not measured, they are given up."""
        means = self.stored.pop(COMPENSATED, None)
        if means is not None and self._before is not None:
            split_index, before = self._before
            compensation = DriftCompensation().fit(before, embeddings[split_index])
            self.stored[COMPENSATED] = means._replace(means=compensation.transform(means.means))

    def state_dict(self) -> dict[str, Any]:
        """The means in both versions, the names of the splits, and what `begin_split` remembered."""
        before = {} if self._before is None else {"split_index": self._before[0], "embeddings": self._before[1]}
        stored = {name: means._asdict() for name, means in self.stored.items()}
        return {"stored": stored, "splits": list(self.splits), "before": before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self.stored = {name: ClassMeans(**state["stored"][name]) for name in NCM_METRICS if name in state["stored"]}
        self.splits, before = list(state["splits"]), state["before"]
        self._before = (int(before["split_index"]), before["embeddings"]) if before else None


def ncm_scores(
    means: Mapping[str, ClassMeans], queries: Sequence[Tensor], labels: Sequence[Tensor], num_splits: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The accuracy by the nearest class mean of every split's queries, and of all queries together; NaN where not measured.

    Args:
        means: by metric the class means of the splits learned so far; a metric without any is NaN.
        queries: of the splits learned so far, [Q, D] each.
        labels: of these queries, [Q] each.
        num_splits: of the whole sequence, S.

    Returns:
        By metric the scores [S], NaN for splits that were not learned; and by metric the pooled score of those that were.
    """
    scores = {name: [math.nan] * num_splits for name in NCM_METRICS}
    pooled = dict.fromkeys(NCM_METRICS, math.nan)
    sizes = [len(one) for one in labels]
    for name, (mean_labels, rows, _) in means.items():
        is_correct = is_nearest_class_mean(torch.cat(list(queries)), torch.cat(list(labels)), rows, mean_labels)
        numbers = [int(part.sum()) for part in is_correct.split(sizes)]
        scores[name][: len(sizes)] = [number / size for number, size in zip(numbers, sizes, strict=True)]
        pooled[name] = sum(numbers) / sum(sizes)
    return scores, pooled


def check_queries_have_means(splits: Sequence[Split]) -> None:
    """Raises `UserError` for a query whose class is not trained on when its split has been learned, so that it has no mean."""
    trained: set[int] = set()
    for split in splits:
        trained.update(split.train.labels.unique().tolist())
        for label in split.query.labels.unique().tolist():
            if label not in trained:
                raise UserError(
                    f"split '{split.name}' has queries of class {label}, but neither it nor an earlier split trains on that "
                    "class, so that it has no class mean; evaluate classes that are trained on, or leave out class_means"
                )
