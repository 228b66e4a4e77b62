"""Evaluation by facts: how well facts find their images, and images their facts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.data import Split, Subset, ordered_batches
from mas_embed.errors import UserError, unknown_name
from mas_embed.evaluation import EVALUATORS, Evaluation, TrackedDetails
from mas_embed.facts.measures import FactDistance, evaluate_fact_recognition, evaluate_fact_retrieval
from mas_embed.facts.table import FactTable
from mas_embed.retrieval import embed

# Of every split; mean average precision by order is given beside them for the orders that each split has
FACT_METRICS = (
    "mean_average_precision",
    "mean_average_precision_found_at_100",
    "mean_average_precision_extending",
    "image_to_fact_k1",
    "image_to_fact_k5",
    "image_to_fact_k10",
    "image_to_fact_mrr",
)


@EVALUATORS.register("facts")
class FactEvaluator:
    """Ranks the images of a split for each of its facts and its facts for each image; and all images and facts together.

    The facts of a split are those of its gallery images, whose labels are rows of the table. See `score_facts` for the
    metrics.

    Args:
        facts: the table; a data set of facts provides it.
        distance: by which facts are ranked for an image, see `evaluate_fact_recognition`.
        track: names of subsets whose facts are also scored apart, by mean average precision, each among the images of the
            splits that the subset is from.
        subsets: by name, see `select_subset`; a config provides its own.
        batch_size: of embedding, without gradients.

    Raises:
        UserError: an unknown subset or a batch size below 1; on use, a label that is no row of the table, or a tracked fact
            without an image.
    """

    def __init__(
        self,
        facts: FactTable,
        *,
        distance: FactDistance = "cosine",
        track: Sequence[str] = (),
        subsets: Mapping[str, Subset] | None = None,
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

    def check(self, splits: Sequence[Split]) -> Collection[str]:
        """The names of the metrics of every split.

        Raises:
            UserError: a label is no row of the table, or a tracked fact has no image.
        """
        for split in splits:
            labels = split.gallery.labels
            if int(labels.min()) < 0 or int(labels.max()) >= len(self.facts):
                raise UserError(
                    f"split '{split.name}' has labels from {labels.min()} to {labels.max()}, which must be rows of the "
                    f"table of {len(self.facts)} facts"
                )
        for name, subset in self.tracked.items():
            seen = torch.cat([splits[index].gallery.labels for index in subset.splits])
            for label in subset.labels[~torch.isin(subset.labels, seen)].tolist():
                raise UserError(f"'{name}' cannot be tracked: no held-out image shows {self.facts.names[label]}")
        return FACT_METRICS

    def without_details(self) -> FactEvaluator:
        """An evaluator with the same scores that tracks no subset."""
        return FactEvaluator(self.facts, distance=self.distance, batch_size=self.batch_size)

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Does nothing: the vectors of facts are given, so there is no index that could become stale."""

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """The scores of every split, of all together, and of the tracked subsets."""
        self.check(splits)
        embeddings = [embed(model, ordered_batches(split.gallery, batch_size=self.batch_size)) for split in splits]
        labels = [split.gallery.labels for split in splits]
        by_split = [
            score_facts(*images, self.facts, distance=self.distance) for images in zip(embeddings, labels, strict=True)
        ]
        pooled = score_facts(torch.cat(embeddings), torch.cat(labels), self.facts, distance=self.distance)
        of_every_split = [name for name in pooled if all(name in scores for scores in by_split)]
        return Evaluation(
            {name: [scores[name] for scores in by_split] for name in of_every_split},
            pooled,
            TrackedDetails(
                {name: self._score_subset(subset, embeddings, labels) for name, subset in self.tracked.items()}
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """The settings; nothing is remembered from split to split."""
        return {"distance": self.distance, "tracked": list(self.tracked)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` for the state of an evaluator with other settings."""
        for name, value in self.state_dict().items():
            if state.get(name) != value:
                raise UserError(f"the state is of an evaluator with {name} {state.get(name)}, but this one has {value}")

    def _score_subset(self, subset: Subset, embeddings: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
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
    """By metric how well images and their facts find each other; no other facts are asked for or searched.

    `mean_average_precision` is that of `evaluate_fact_retrieval` where only images of the same fact are relevant; the same
    with `_order_1`, `_order_2` and `_order_3` over the facts that fill so many slots, as far as there are any;
    `_found_at_100` the variant of the release; and under `_extending` images of a fact that extends the one that is asked
    for are relevant too. `image_to_fact_k1`, `_k5`, `_k10` and `_mrr` are those of `evaluate_fact_recognition`.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] int64, rows of the table.
        facts: the table.
        distance: by which facts are ranked for an image.
    """
    table = facts.vectors, facts.weights
    same = evaluate_fact_retrieval(embeddings, labels, *table, facts=labels)
    extending = evaluate_fact_retrieval(embeddings, labels, *table, facts=labels, match="extending")
    recognised = evaluate_fact_recognition(embeddings, labels, *table, facts=labels, distance=distance)
    return {
        "mean_average_precision": same.mean_average_precision,
        "mean_average_precision_found_at_100": same.mean_average_precision_found_at_100,
        "mean_average_precision_extending": extending.mean_average_precision,
        **{f"mean_average_precision_order_{order}": value for order, value in same.by_order.items()},
        **{f"image_to_fact_k{k}": value for k, value in recognised.hits_at.items()},
        "image_to_fact_mrr": recognised.mean_reciprocal_rank,
    }
