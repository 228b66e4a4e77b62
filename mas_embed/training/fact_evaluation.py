"""What a model knows of facts: how well they find images, and how well images find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.data import FactTable, Split, Subset
from mas_embed.errors import UserError
from mas_embed.retrieval import embed
from mas_embed.retrieval.facts import FactDistance, evaluate_fact_recognition, evaluate_fact_retrieval
from mas_embed.training.evaluation import Judgement, Row
from mas_embed.training.loading import ordered_batches

# What is measured of every split; mean average precision by order only of those that each split has
FACT_METRICS = (
    "mean_average_precision",
    "mean_average_precision_found_at_100",
    "mean_average_precision_extending",
    "image_to_fact_k1",
    "image_to_fact_k5",
    "image_to_fact_k10",
    "image_to_fact_mrr",
)


@dataclass
class FactJudge:
    """Ranks the images of a split for each of its facts and its facts for each image; and all images and facts together.

    Args:
        model: that is trained.
        splits: whose galleries hold images labelled with rows of the table; the facts of a split are those of its images.
        facts: the table.
        batch_size: of embedding.
        distance: by which facts are ranked for an image, see `evaluate_fact_recognition`.
        followed: by name facts whose mean average precision is told apart, each among the images of its splits.

    Raises:
        UserError: a gallery without images, a label that is no row of the table, or a followed fact without an image.
    """

    model: nn.Module
    splits: Sequence[Split]
    facts: FactTable
    batch_size: int
    distance: FactDistance = "cosine"
    followed: Mapping[str, Subset] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for split in self.splits:
            labels = split.gallery.labels
            if len(labels) == 0:
                raise UserError(f"split '{split.name}' has an empty gallery part")
            if int(labels.min()) < 0 or int(labels.max()) >= len(self.facts):
                raise UserError(
                    f"split '{split.name}' has labels from {labels.min()} to {labels.max()}, which must be rows of the "
                    f"table of {len(self.facts)} facts"
                )
        for name, subset in self.followed.items():
            seen = torch.cat([self.splits[index].gallery.labels for index in subset.splits])
            for label in subset.labels[~torch.isin(subset.labels, seen)].tolist():
                raise UserError(f"'{name}' cannot be followed: no held-out image shows {self.facts.names[label]}")

    def plan(self) -> dict[str, Any]:
        """That facts are judged, and how."""
        return {"evaluation": "facts", "distance": self.distance, "followed": list(self.followed)}

    def scores(self) -> tuple[Row, dict[str, float]]:
        """Of the model as it is: by metric the scores of the splits, and those of all facts and images together."""
        return self._scores(self._embed_all())

    def begin_split(self, split: Split) -> None:
        """Remembers nothing: the vectors of facts are given, and never grow old."""

    def end_split(self, split: Split) -> Judgement:
        """What is known after a split was learned."""
        embeddings = self._embed_all()
        followed = {name: self._precision(embeddings, subset) for name, subset in self.followed.items()}
        return Judgement(*self._scores(embeddings), followed=followed)

    def _scores(self, embeddings: Sequence[Tensor]) -> tuple[Row, dict[str, float]]:
        labels = [split.gallery.labels for split in self.splits]
        rows = [
            score_facts(*images, self.facts, distance=self.distance) for images in zip(embeddings, labels, strict=True)
        ]
        over_all = score_facts(torch.cat(list(embeddings)), torch.cat(labels), self.facts, distance=self.distance)
        return {name: [row[name] for row in rows] for name in over_all if all(name in row for row in rows)}, over_all

    def _precision(self, embeddings: Sequence[Tensor], subset: Subset) -> float:
        images = torch.cat([embeddings[index] for index in subset.splits])
        labels = torch.cat([self.splits[index].gallery.labels for index in subset.splits])
        table = self.facts.vectors, self.facts.weights
        return evaluate_fact_retrieval(images, labels, *table, facts=subset.labels).mean_average_precision

    def _embed_all(self) -> list[Tensor]:
        batches = [ordered_batches(split.gallery, batch_size=self.batch_size) for split in self.splits]
        return [embed(self.model, own) for own in batches]


def score_facts(
    embeddings: Tensor, labels: Tensor, facts: FactTable, *, distance: FactDistance = "cosine"
) -> dict[str, float]:
    """By metric how well images and their facts find each other; no other facts are asked for or searched.

    `mean_average_precision` is that of `evaluate_fact_retrieval` where only images of the same fact are relevant; the same
    with `_order_1`, `_order_2` and `_order_3` over the facts that fill so many slots, as far as there are any;
    `_found_at_100` the release's; and under `_extending` images of a fact that extends the one that is asked for are
    relevant too. `image_to_fact_k1`, `_k5`, `_k10` and `_mrr` are those of `evaluate_fact_recognition`.

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
