"""The evaluator facts: how well facts retrieve their images, and how well the facts of images are recognised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mas_embed.data import Split, Subset, check_splits
from mas_embed.errors import UserError, unknown_name
from mas_embed.evaluation import (
    BEFORE_FIRST,
    EVALUATORS,
    NUM_NEIGHBOURS,
    Described,
    Evaluation,
    Observations,
    Recorder,
    TrackedDetails,
    check_same_settings,
    embed_part,
    found_items,
)
from mas_embed.facts.metrics import FactDistance, evaluate_fact_recognition, evaluate_fact_retrieval, nearest_images
from mas_embed.facts.table import FactTable
from mas_embed.runtime.checks import as_whole_number

# The metrics of every split. There are also those by order, for the orders that occur in every split; see `score_facts`
FACT_METRICS = (
    "mean_average_precision",
    "mean_average_precision_found_at_100",
    "mean_average_precision_extending",
    "image_to_fact_k1",
    "image_to_fact_k5",
    "image_to_fact_k10",
    "image_to_fact_mrr",
)


@dataclass(frozen=True)
class FactDetails(TrackedDetails):
    """Details of facts.

    Attributes:
        all_galleries: the mean average precision of the facts of every split learned so far, among the images of all splits;
            None before the first split is learned.
    """

    all_galleries: dict[str, list[float]] | None = None


@EVALUATORS.register("facts")
class FactEvaluator:
    """Retrieves the gallery images of a split by their facts, and recognises the facts of these images.

    A split is scored on its gallery images and the facts that they show; the pooled scores are over the gallery images of all
    splits and all of their facts. The labels are rows of the table of facts. See `score_facts` for the metrics.

    Args:
        facts: the table, which the data set provides.
        distance: by which facts are ranked for an image, see `evaluate_fact_recognition`.
        track: names of subsets. The mean average precision of the facts of each is reported after every split, over the
            gallery images of the splits that the subset is from.
        subsets: by name, see `select_subset`; an experiment provides those of its config.
        recorded_queries: the number of facts of a split, at most, whose nearest images are recorded for the report; 0 to record
            nothing.
        batch_size: number of images that are embedded at once.

    Raises:
        UserError: a subset is unknown, the batch size is below 1, or the number of recorded facts is below 0.
    """

    def __init__(
        self,
        facts: FactTable,
        *,
        distance: FactDistance = "cosine",
        track: Sequence[str] = (),
        subsets: Mapping[str, Subset] | None = None,
        recorded_queries: int = 256,
        batch_size: int = 256,
    ) -> None:
        subsets = subsets or {}
        for name in track:
            if name not in subsets:
                raise unknown_name("subset", name, subsets)
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.facts, self.distance, self.batch_size = facts, distance, batch_size
        self.tracked = {name: subsets[name] for name in track}
        self.recorded_queries = as_whole_number("recorded_queries", recorded_queries, 0)
        described = Described("average precision", "negative squared distance", kind="label")
        self._recorder = Recorder(self.recorded_queries, described)

    def check(self, splits: Sequence[Split]) -> Collection[str]:
        """The names of the metrics of every split, with mean average precision by each order that all splits have.

        Raises:
            UserError: a part is empty, a label is not a row of the table, or a tracked fact has no gallery image.
        """
        check_splits(splits)
        for split in splits:
            labels = split.gallery.labels
            if int(labels.min()) < 0 or int(labels.max()) >= len(self.facts):
                raise UserError(
                    f"split '{split.name}' has labels from {labels.min()} to {labels.max()}, which must be rows of the "
                    f"table of {len(self.facts)} facts"
                )
        for name, subset in self.tracked.items():
            evaluated = torch.cat([splits[index].gallery.labels for index in subset.splits])
            for label in subset.labels[~torch.isin(subset.labels, evaluated)].tolist():
                raise UserError(f"'{name}' cannot be tracked: no held-out image shows {self.facts.names[label]}")
        orders = [set(self.facts.orders[split.gallery.labels].tolist()) for split in splits]
        by_order = [f"mean_average_precision_order_{order}" for order in sorted(set.intersection(*orders))]
        return [*FACT_METRICS, *by_order]

    def without_details(self) -> FactEvaluator:
        """An evaluator with the same scores that tracks no subset and records nothing."""
        return FactEvaluator(self.facts, distance=self.distance, recorded_queries=0, batch_size=self.batch_size)

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Does nothing: there is no index that could become stale, because the vectors of facts do not change."""

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """The scores of every split, the scores pooled over all splits, and the scores of the tracked subsets.

        Raises:
            UserError: `check` refuses the splits.
        """
        self.check(splits)
        embeddings = [embed_part(model, split.gallery, batch_size=self.batch_size) for split in splits]
        labels = [split.gallery.labels for split in splits]
        by_split = [
            score_facts(*items, self.facts, distance=self.distance) for items in zip(embeddings, labels, strict=True)
        ]
        pooled, precision = _score(torch.cat(embeddings), torch.cat(labels), self.facts, self.distance)
        metrics = [name for name in pooled if all(name in scores for scores in by_split)]
        tracked = {name: self._score_subset(subset, embeddings, labels) for name, subset in self.tracked.items()}
        self._record(split_index, embeddings, labels, precision)
        of_learned = [float(precision[of_split.unique()].mean()) for of_split in labels[: split_index + 1]]
        details = FactDetails(tracked, {"mean_average_precision": of_learned} if of_learned else None)
        return Evaluation({name: [scores[name] for scores in by_split] for name in metrics}, pooled, details)

    def observations(self) -> Observations | None:
        """What was recorded of the facts and of the images; None without any."""
        return self._recorder.observations()

    def _record(
        self, split_index: int, embeddings: Sequence[Tensor], labels: Sequence[Tensor], precision: NDArray[np.float64]
    ) -> None:
        """Records the images that are nearest to a sample of facts, from the average precision of all facts [F]."""
        if split_index == BEFORE_FIRST:
            self._recorder.forget()
        facts = [of_split.unique() for of_split in labels]  # of every split
        self._recorder.begin(facts, labels)
        if split_index == BEFORE_FIRST or not self._recorder.is_recording:
            return
        sampled = torch.cat(facts)[torch.from_numpy(self._recorder.positions([len(rows) for rows in facts]))]
        table = {"vectors": self.facts.vectors, "weights": self.facts.weights}
        images = torch.cat(list(embeddings))
        nearest = nearest_images(images, sampled, NUM_NEIGHBOURS, **table)
        found = found_items(nearest, labels)
        self._recorder.record(split_index, facts, precision[torch.cat(facts).numpy()], found, images, labels)

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
        return {"distance": self.distance, "tracked": list(self.tracked)}

    def _score_subset(self, subset: Subset, embeddings: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
        """The mean average precision of the subset's facts, from the embeddings and labels of each split."""
        return evaluate_fact_retrieval(
            torch.cat([embeddings[index] for index in subset.splits]),
            torch.cat([labels[index] for index in subset.splits]),
            self.facts.vectors,
            self.facts.weights,
            facts=subset.labels,
        ).mean_average_precision


def score_facts(
    embeddings: Tensor, labels: Tensor, facts: FactTable, *, distance: FactDistance = "cosine"
) -> dict[str, float]:
    """The scores of images and the facts that they show, by metric; other facts of the table are neither queries nor ranked.

    - `mean_average_precision`: that of `evaluate_fact_retrieval`, where the images labelled with a fact are relevant to it;
    - `mean_average_precision_found_at_100`: its variant "found at 100";
    - `mean_average_precision_extending`: the same with `match="extending"`, where images of a fact that extends the queried
      fact are relevant too;
    - `mean_average_precision_order_1`, `_order_2` and `_order_3`: over the facts that fill 1, 2 or 3 slots, if there are any;
    - `image_to_fact_k1`, `_k5`, `_k10` and `_mrr`: those of `evaluate_fact_recognition`.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] int64, rows of the table.
        facts: the table.
        distance: by which facts are ranked for an image.
    """
    return _score(embeddings, labels, facts, distance)[0]


def _score(
    embeddings: Tensor, labels: Tensor, facts: FactTable, distance: FactDistance
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """The scores of `score_facts`, and the average precision of every fact [F]; NaN for facts that no image shows."""
    table = facts.vectors, facts.weights
    same = evaluate_fact_retrieval(embeddings, labels, *table, facts=labels)
    extending = evaluate_fact_retrieval(embeddings, labels, *table, facts=labels, match="extending")
    recognised = evaluate_fact_recognition(embeddings, labels, *table, facts=labels, distance=distance)
    scores = {
        "mean_average_precision": same.mean_average_precision,
        "mean_average_precision_found_at_100": same.mean_average_precision_found_at_100,
        "mean_average_precision_extending": extending.mean_average_precision,
        **{f"mean_average_precision_order_{order}": value for order, value in same.by_order.items()},
        **{f"image_to_fact_k{k}": value for k, value in recognised.hits_at.items()},
        "image_to_fact_mrr": recognised.mean_reciprocal_rank,
    }
    return scores, same.average_precision
