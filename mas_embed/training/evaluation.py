"""What a model knows of every split, and what its training does to an index that was made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mas_embed.data import Part, Split
from mas_embed.errors import UserError
from mas_embed.retrieval import Distance, IndexCompatibility, compare_indexes, embed, evaluate_retrieval
from mas_embed.training.loading import ordered_batches

Row = dict[str, list[float]]  # by metric the scores [S] of the splits


def check_splits(splits: Sequence[Split]) -> None:
    """Refuses a sequence that cannot be trained or judged.

    Raises:
        UserError: no splits, two of one name, or an empty part.
    """
    if not splits:
        raise UserError("a sequence needs at least one split")
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise UserError(f"every split needs a name of its own, got {names}")
    for split in splits:
        for part_name in ("train", "query", "gallery"):
            if len(getattr(split, part_name)) == 0:
                raise UserError(f"split '{split.name}' has an empty {part_name} part")


def _refuse_vain_queries(splits: Sequence[Split]) -> None:
    """Raises `UserError` for a query whose class the gallery of all splits lacks."""
    labels = torch.cat([split.gallery.labels for split in splits])
    ids = torch.cat([split.gallery.ids for split in splits])
    for split in splits:
        for label in split.query.labels.unique():
            own = split.query.ids[split.query.labels == label]
            in_gallery = ids[labels == label]
            # A class is asked for in vain if its queries find nothing, or nothing but themselves
            if len(in_gallery) == 0 or (len(in_gallery) == 1 and bool((own == in_gallery).any())):
                raise UserError(
                    f"split '{split.name}' has queries of class {int(label)}, but no gallery has another image of that class"
                )


class Judgement(NamedTuple):
    """What is known after a split.

    Attributes:
        row: by metric the scores [S] of the splits.
        over_all: by metric the mean over the queries of all splits together.
        kept_row: the scores [S] with the gallery that is never embedded again; None where no index is watched.
        old_index: what became of the index of the splits before (`IndexCompatibility.as_dict`); None after the first split too.
        followed: by name the scores of what is followed beside the splits.
    """

    row: Row
    over_all: dict[str, float]
    kept_row: Row | None = None
    old_index: dict[str, Any] | None = None
    followed: Mapping[str, float] = {}


class Judge(Protocol):
    """Says what a model knows of the splits, before and after it learns each of them.

    Attributes:
        kept: what is remembered from one split to the next; goes into the checkpoint.
    """

    kept: list[Tensor]

    def plan(self) -> dict[str, Any]:
        """How it judges; a checkpoint of a sequence that was judged otherwise is refused."""

    def scores(self) -> tuple[Row, dict[str, float]]:
        """Of the model as it is: by metric the scores of the splits, and those of all splits together."""

    def begin_split(self, split: Split) -> None:
        """Called before a split is learned."""

    def end_split(self, split: Split) -> Judgement:
        """What is known after a split was learned."""


MakeJudge = Callable[..., Judge]  # (model, splits, batch_size=...) -> Judge


@dataclass
class LabelJudge:
    """Ranks one gallery of all splits' held-out items for the queries of each split, whenever it is asked.

    Args:
        model: that is trained.
        splits: that are judged.
        distance: by which items are ranked.
        recall_at: the K of recall at K.
        batch_size: of embedding.
        watches_index: whether it follows what happens to a gallery that is not embedded again. The splits are then those
            that are trained, in that order.

    Attributes:
        kept: the gallery that is never embedded again: an item keeps the vector that it had when its split was learned; by
            split, of those that were learned.

    Raises:
        UserError: a query's class is not in the gallery of all splits.
    """

    model: nn.Module
    splits: Sequence[Split]
    distance: Distance
    recall_at: Sequence[int]
    batch_size: int
    watches_index: bool
    kept: list[Tensor] = field(default_factory=list)
    _before: _Embedded | None = None
    _train_before: Tensor | None = None

    def __post_init__(self) -> None:
        _refuse_vain_queries(self.splits)

    def plan(self) -> dict[str, Any]:
        """How it ranks, and whether an index is watched."""
        return {
            "distance": self.distance,
            "recall_at": list(self.recall_at),
            "watch_index": self.watches_index,
        }

    def scores(self) -> tuple[Row, dict[str, float]]:
        """Of the model as it is: by metric the scores of the splits, and the mean over all queries together."""
        embedded = self._embed_all()
        return self._ranked(embedded.queries, embedded.galleries)

    def begin_split(self, split: Split) -> None:
        """Remembers the model's embeddings as they are before a split is learned."""
        if self.watches_index and self.kept:
            self._before, self._train_before = self._embed_all(), self._embed(split.train)

    def end_split(self, split: Split) -> Judgement:
        """What is known after a split was learned."""
        embedded = self._embed_all()
        row, over_all = self._ranked(embedded.queries, embedded.galleries)
        if not self.watches_index:
            return Judgement(row, over_all)
        num_learned = len(self.kept)
        self.kept.append(embedded.galleries[num_learned])
        kept_row, _ = self._ranked(embedded.queries, [*self.kept, *embedded.galleries[num_learned + 1 :]])
        if self._before is None or self._train_before is None:
            return Judgement(row, over_all, kept_row)
        fit_on = (self._train_before, self._embed(split.train))
        compared = self._compare(self._before, embedded, num_learned, fit_on)
        return Judgement(row, over_all, kept_row, {"after": split.name, **compared.as_dict()})

    def _compare(
        self, before: _Embedded, after: _Embedded, num_learned: int, fit_on: tuple[Tensor, Tensor]
    ) -> IndexCompatibility:
        """The index of the splits learned before, and their queries, across the training of one more split."""
        splits = self.splits[:num_learned]
        parts = (before.queries, after.queries, before.galleries, after.galleries)
        old_queries, new_queries, old_gallery, new_gallery = (torch.cat(part[:num_learned]) for part in parts)
        return compare_indexes(
            old_queries,
            new_queries,
            old_gallery,
            new_gallery,
            torch.cat([split.query.labels for split in splits]),
            torch.cat([split.gallery.labels for split in splits]),
            query_ids=torch.cat([split.query.ids for split in splits]),
            gallery_ids=torch.cat([split.gallery.ids for split in splits]),
            distance=self.distance,
            k=min(10, len(old_gallery) - 1),
            fit_on=fit_on,
        )

    def _ranked(self, queries: Sequence[Tensor], galleries: Sequence[Tensor]) -> tuple[Row, dict[str, float]]:
        gallery = torch.cat(list(galleries))
        gallery_labels = torch.cat([split.gallery.labels for split in self.splits])
        gallery_ids = torch.cat([split.gallery.ids for split in self.splits])
        by_split = [
            evaluate_retrieval(
                asked,
                split.query.labels,
                gallery,
                gallery_labels,
                query_ids=split.query.ids,
                gallery_ids=gallery_ids,
                distance=self.distance,
                recall_at=self.recall_at,
            )
            for split, asked in zip(self.splits, queries, strict=True)
        ]
        num_scored = [scores.num_queries - scores.num_skipped for scores in by_split]
        by_metric = {name: [scores.as_dict()[name] for scores in by_split] for name in by_split[0].as_dict()}
        over_all = {name: float(np.average(values, weights=num_scored)) for name, values in by_metric.items()}
        return by_metric, over_all

    def _embed_all(self) -> _Embedded:
        galleries = [self._embed(split.gallery) for split in self.splits]
        queries = [
            gallery if split.query is split.gallery else self._embed(split.query)
            for split, gallery in zip(self.splits, galleries, strict=True)
        ]
        return _Embedded(queries, galleries)

    def _embed(self, part: Part) -> Tensor:
        return embed(self.model, ordered_batches(part, batch_size=self.batch_size))


class _Embedded(NamedTuple):
    """The held-out items of every split, as a model embeds them."""

    queries: list[Tensor]
    galleries: list[Tensor]
