"""Evaluation by retrieval: the queries of every split against one gallery of all splits' held-out items.

S splits, Q queries of a split, G gallery items of a split, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.data import Part, Split
from mas_embed.errors import UserError
from mas_embed.evaluation.base import BEFORE_FIRST, EVALUATORS, Evaluation, check_same_settings
from mas_embed.evaluation.embedding import embed_part
from mas_embed.evaluation.held_out import BeforeSplit, HeldOut, in_order, numbered
from mas_embed.evaluation.own_gallery import check_queries_are_answerable, scores_of_own_galleries
from mas_embed.evaluation.recording import Array, Observations
from mas_embed.evaluation.retrieval_recorder import RetrievalRecorder
from mas_embed.evaluation.stored_means import (
    NCM_METRICS,
    RECOMPUTED,
    StoredClassMeans,
    check_queries_have_means,
    ncm_scores,
)
from mas_embed.retrieval import (
    METRICS,
    Distance,
    IndexUpdate,
    check_distance,
    class_means,
    compare_indexes,
    evaluate_retrieval,
)
from mas_embed.retrieval.inputs import unit_rows
from mas_embed.runtime.checks import as_whole_number, shown
from mas_embed.runtime.distributed import num_processes, process_rank, share_of
from mas_embed.runtime.fingerprint import fingerprint_of

NUM_NEIGHBOURS = 10  # whose churn is measured


@dataclass(frozen=True)
class RetrievalDetails:
    """What became of the vectors that were stored before the model was updated.

    Attributes:
        stale_gallery: by metric the scores [S] where the gallery is never embedded again: an item keeps the vector that it
            got at the first evaluation after its split was learned. None while no stored vector is older than the model.
        index_update: what the last update did to the index of the splits before it; None after the first split.
        own_gallery: by metric the scores of the splits learned so far, where the queries of a split search its own gallery only.
    """

    stale_gallery: dict[str, list[float]] | None = None
    index_update: IndexUpdate | None = None
    own_gallery: dict[str, list[float]] | None = None


@EVALUATORS.register("retrieval")
class RetrievalEvaluator:
    """Ranks one gallery of all splits' held-out items for the queries of every split.

    An item is relevant to a query if both have the same label; a query's own item is left out. Every held-out item is
    embedded once by the same weights, and all queries are ranked in one call. See `evaluate_retrieval` for the metrics.

    If some queries are of classes that no split trains on, and some of others, every metric is also given for either kind, as
    `<metric>_seen` and `<metric>_unseen`.

    Args:
        distance: by which items are ranked: "cosine", "euclidean" or "inner_product".
        recall_at: the K of recall at K.
        follow_index: also score a gallery that is never embedded again, and compare the index of the splits so far before
            and after every update (`compare_indexes`, with compensations that are fitted on the training inputs of the new
            split). Costs one pass over these inputs before and one after the split.
        class_means: also classify the queries of the splits learned so far by the nearest mean of all classes learned so far
            (`nearest_class_mean_accuracy`). A class mean is that of the embeddings of the class's training items, not augmented,
            by the weights at the first evaluation after its split was learned. There are three accuracies, NaN for splits that
            were not learned: `ncm_accuracy` with the means as they were stored; `ncm_accuracy_compensated` with the means moved
            across every later split by `DriftCompensation`, fitted on the training items of that split; and
            `ncm_accuracy_recomputed` with all means computed again by the present weights, which takes the training items of
            the earlier splits and costs a pass over them. Under "cosine" embeddings are scaled to unit length first, and means
            are not; the distance of a query from a mean is Euclidean.
        own_galleries: also score the queries of every split learned so far on the gallery of their own split alone, which tells
            a split that is forgotten from one that is confused with others.
        recorded_queries: the number of queries of a split, at most, whose neighbours are recorded for the report; 0 to record
            nothing. What is recorded is what `observations` returns.
        batch_size: of embedding, without gradients.
        num_workers: processes that load the items, as for training; 0 to load them in this one.

    Raises:
        UserError: an unknown distance, a K or batch size below 1, a number of workers or of recorded queries below 0, or class
            means under "inner_product".

    Source: class means and their compensation as in Yu et al., *Semantic Drift Compensation for Class-Incremental Learning*,
        CVPR 2020. Their code embeds augmented training images, drawn anew for either model.

    Examples:
        >>> from mas_embed import digits, small_conv
        >>> evaluation = RetrievalEvaluator().evaluate(small_conv(), digits(), -1)
        >>> len(evaluation.scores["mean_average_precision"])
        5
    """

    def __init__(
        self,
        *,
        distance: Distance = "cosine",
        recall_at: Sequence[int] = (1, 2, 4, 8),
        follow_index: bool = True,
        class_means: bool = False,
        own_galleries: bool = True,
        recorded_queries: int = 256,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        check_distance(distance)
        if not isinstance(recall_at, Sequence) or not recall_at:
            raise UserError(f"recall_at must hold whole numbers >= 1, got {shown(recall_at)}")
        recall_at = [as_whole_number("every number of recall_at", k, 1) for k in recall_at]
        batch_size = as_whole_number("batch_size", batch_size, 1)
        self.distance, self.recall_at = distance, tuple(recall_at)
        if class_means and distance == "inner_product":
            raise UserError("class_means compare by the Euclidean distance; take distance cosine or euclidean")
        self.follow_index, self.class_means, self.batch_size = follow_index, class_means, batch_size
        self.own_galleries = own_galleries
        self.recorded_queries = as_whole_number("recorded_queries", recorded_queries, 0)
        self.num_workers = as_whole_number("num_workers", num_workers, 0)
        self._recorder = RetrievalRecorder(self.recorded_queries, distance)
        self._fingerprint = ""  # of the weights that have embedded what is in `_embedded`: queries and gallery by split
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}
        self._embedded_train: dict[str, Tensor] = {}  # by the same weights
        self._stale_galleries: dict[str, Tensor] = {}  # of the splits learned so far by name, as they were first stored
        self._trained_labels = torch.empty(
            0, dtype=torch.long
        )  # of all splits, also of those whose data is gone by now
        self._before: BeforeSplit | None = None
        self._means = StoredClassMeans()

    def check(self, splits: Sequence[Split]) -> list[str]:
        """The names of the metrics; raises `UserError` for a query whose class the gallery lacks, or that has no class mean."""
        check_queries_are_answerable(splits)
        names = [*METRICS, *(f"recall_at_{k}" for k in self.recall_at)]
        names += [f"{name}_{kind}" for kind in _kinds_of_queries(splits) for name in names]
        if self.class_means:
            check_queries_have_means(splits)
            names += NCM_METRICS
        return names

    def without_details(self) -> RetrievalEvaluator:
        """An evaluator with the same scores that follows no index and records nothing."""
        return RetrievalEvaluator(
            distance=self.distance,
            recall_at=self.recall_at,
            follow_index=False,
            class_means=self.class_means,
            own_galleries=False,
            recorded_queries=0,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )

    def begin_split(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> None:
        """Embeds the new split's training inputs with the weights before it, to fit compensations on."""
        if self.follow_index and self._stale_galleries:
            held_out = self._embed_held_out(model, splits)
            (train,) = self._embed_train(model, [splits[split_index]])
            names = [split.name for split in splits]
            self._before = BeforeSplit(held_out, names, names[split_index], train)
        if self.class_means and self._means.splits:
            (train,) = self._embed_train(model, [splits[split_index]])
            self._means.begin_split(split_index, self._for_means(train))

    def evaluate(self, model: nn.Module, splits: Sequence[Split], split_index: int) -> Evaluation:
        """The scores of every split, and what became of the vectors that were stored before."""
        if split_index == BEFORE_FIRST:
            self._forget()
            self.check(splits)
            self._recorder.begin_sequence(splits)
        trained = [split.train.labels for split in splits]
        self._trained_labels = torch.cat([self._trained_labels, *trained]).unique()
        held_out = self._embed_held_out(model, splits)
        ranked, pooled, average_precision = self._rank(splits, held_out.queries, held_out.galleries)
        scores, own_gallery = ranked, None
        if split_index != BEFORE_FIRST:
            self._recorder.record_evaluation(splits, split_index, *held_out, average_precision)
        if split_index != BEFORE_FIRST and self.own_galleries:
            own_gallery = scores_of_own_galleries(splits[: split_index + 1], *held_out, distance=self.distance)
        if self.class_means:
            accuracies, pooled_accuracies = self._classify(model, splits, held_out.queries, split_index + 1)
            scores, pooled = ranked | accuracies, pooled | pooled_accuracies
        if not self.follow_index or split_index == BEFORE_FIRST:
            return Evaluation(scores, pooled, RetrievalDetails(own_gallery=own_gallery) if own_gallery else None)
        earlier = set(self._stale_galleries)
        for split, gallery in zip(splits[: split_index + 1], held_out.galleries, strict=False):
            self._stale_galleries.setdefault(split.name, gallery)
        if not earlier:
            return Evaluation(scores, pooled, RetrievalDetails(own_gallery=own_gallery))
        # Where no vector has changed, as after a split that a method does not learn, the ranking is the same
        stored = [self._stale_galleries.get(split.name) for split in splits]
        galleries = [new if old is None else old for old, new in zip(stored, held_out.galleries, strict=True)]
        is_fresh = all(map(torch.equal, galleries, held_out.galleries))
        stale_scores = ranked if is_fresh else self._rank(splits, held_out.queries, galleries)[0]
        details = RetrievalDetails(stale_scores, self._compare(model, splits, held_out, earlier), own_gallery)
        self._before = None
        return Evaluation(scores, pooled, details)

    def observations(self) -> Observations | None:
        """What was recorded of the queries, of classes and of gallery items; None without any."""
        return self._recorder.observations()

    def state_dict(self) -> dict[str, Any]:
        """The settings, the gallery vectors and class means that were stored, and what `begin_split` embedded."""
        return {
            **self._settings(),
            "stale_galleries": numbered(self._stale_galleries.values()),
            "stale_splits": list(self._stale_galleries),
            "trained_labels": self._trained_labels,
            "before": {} if self._before is None else self._before.as_state(),
            "means": self._means.state_dict(),
            "recorder": self._recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: it is of an evaluator with other settings.
        """
        check_same_settings(state, self._settings())
        self._forget()
        galleries = in_order(state["stale_galleries"])
        self._stale_galleries = dict(zip(state["stale_splits"], galleries, strict=True))
        self._trained_labels = state["trained_labels"]
        self._before = BeforeSplit.of_state(state["before"]) if state["before"] else None
        self._means.load_state_dict(state["means"])
        self._recorder.load_state_dict(state.get("recorder", {}))

    def _settings(self) -> dict[str, Any]:
        names = ("distance", "follow_index", "class_means")
        return {"recall_at": list(self.recall_at), **{name: getattr(self, name) for name in names}}

    def _forget(self) -> None:
        self._fingerprint, self._embedded, self._embedded_train = "", {}, {}
        self._stale_galleries, self._before, self._means = {}, None, StoredClassMeans()
        self._trained_labels = torch.empty(0, dtype=torch.long)

    def _embed_held_out(self, model: nn.Module, splits: Sequence[Split]) -> HeldOut:
        """The held-out items of every split; none is embedded twice by the same weights."""
        self._drop_embeddings_of_other_weights(model)
        for split in splits:
            if split.name not in self._embedded:
                gallery = self._embed(model, split.gallery)
                queries = gallery if split.query is split.gallery else self._embed(model, split.query)
                self._embedded[split.name] = queries, gallery
        pairs = [self._embedded[split.name] for split in splits]
        return HeldOut([queries for queries, _ in pairs], [gallery for _, gallery in pairs])

    def _embed_train(self, model: nn.Module, splits: Sequence[Split]) -> list[Tensor]:
        """The training inputs of every split, not augmented; none is embedded twice by the same weights."""
        self._drop_embeddings_of_other_weights(model)
        for split in splits:
            if split.name not in self._embedded_train:
                self._embedded_train[split.name] = self._embed(model, split.train)
        return [self._embedded_train[split.name] for split in splits]

    def _drop_embeddings_of_other_weights(self, model: nn.Module) -> None:
        fingerprint = fingerprint_of(model)
        if fingerprint != self._fingerprint:
            self._fingerprint, self._embedded, self._embedded_train = fingerprint, {}, {}

    def _embed(self, model: nn.Module, part: Part) -> Tensor:
        return embed_part(model, part, batch_size=self.batch_size, num_workers=self.num_workers)

    def _rank(
        self, splits: Sequence[Split], queries: Sequence[Tensor], galleries: Sequence[Tensor]
    ) -> tuple[dict[str, list[float]], dict[str, float], Array]:
        """By metric the scores of the splits, and those of all queries together; and the average precision of every query.

        The gallery is prepared once for all.
        """
        gallery = torch.cat(list(galleries))
        is_sharded = len(gallery) >= num_processes() > 1  # each process ranks a part, and the counts add up
        own = share_of(len(gallery), process_rank(), num_processes()) if is_sharded else slice(None)
        ranked = evaluate_retrieval(
            torch.cat(list(queries)),
            _joined(splits, "query", "labels"),
            gallery[own],
            _joined(splits, "gallery", "labels")[own],
            query_ids=_joined(splits, "query", "ids"),
            gallery_ids=_joined(splits, "gallery", "ids")[own],
            distance=self.distance,
            recall_at=self.recall_at,
            is_sharded=is_sharded,
        )
        sizes = [len(split.query) for split in splits]
        by_split, pooled = ranked.means_by_group(sizes), ranked.as_dict()
        scores = {name: [means[name] for means in by_split] for name in pooled}
        for kind, is_of_kind in _kinds_of_queries(splits, self._trained_labels).items():
            of_splits = [
                ranked.means_of(is_of_kind & is_of_split)
                for is_of_split in torch.block_diag(*(torch.ones(1, size) for size in sizes)).bool()
            ]
            of_all = ranked.means_of(is_of_kind)
            scores |= {f"{name}_{kind}": [means[name] for means in of_splits] for name in of_all}
            pooled |= {f"{name}_{kind}": value for name, value in of_all.items()}
        return scores, pooled, ranked.per_query["average_precision"]

    def _classify(
        self, model: nn.Module, splits: Sequence[Split], queries: Sequence[Tensor], num_learned: int
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """The accuracies by the nearest class mean after the first splits were learned, see `ncm_scores`."""
        learned = splits[:num_learned]
        if not learned:
            return ncm_scores({}, [], [], len(splits))
        self._means.check(learned)
        train = [self._for_means(rows) for rows in self._embed_train(model, learned)]
        self._means.end_split(learned, train)
        recomputed = class_means(torch.cat(train), _joined(learned, "train", "labels"))
        return ncm_scores(
            {**self._means.stored, RECOMPUTED: recomputed},
            [self._for_means(rows) for rows in queries[:num_learned]],
            [split.query.labels for split in learned],
            len(splits),
        )

    def _for_means(self, rows: Tensor) -> Tensor:
        """Embeddings [N, D] as class means are made of them, in float64: of unit length under "cosine"."""
        return unit_rows(rows, "embeddings") if self.distance == "cosine" else rows.double()

    def _compare(
        self, model: nn.Module, splits: Sequence[Split], held_out: HeldOut, learned_before: Set[str]
    ) -> IndexUpdate | None:
        """The queries and the index of the splits learned before, across the update; None if the data of all is gone."""
        if self._before is None:
            return None
        before = {name: position for position, name in enumerate(self._before.splits)}
        positions = [index for index, one in enumerate(splits) if one.name in learned_before & before.keys()]
        earlier = [splits[index] for index in positions]
        if not earlier:
            return None
        split = next(one for one in splits if one.name == self._before.split)
        new_queries, new_gallery = (torch.cat([part[index] for index in positions]) for part in held_out)
        old_queries, old_gallery = (
            torch.cat([part[before[one.name]] for one in earlier]) for part in self._before.held_out
        )
        (train,) = self._embed_train(model, [split])
        compared = compare_indexes(
            old_queries,
            new_queries,
            old_gallery,
            new_gallery,
            _joined(earlier, "query", "labels"),
            _joined(earlier, "gallery", "labels"),
            query_ids=_joined(earlier, "query", "ids"),
            gallery_ids=_joined(earlier, "gallery", "ids"),
            distance=self.distance,
            k=min(NUM_NEIGHBOURS, len(old_gallery) - 1),
            fit_on=(self._before.train, train),
        )
        return compared.summary(after=split.name)


def _kinds_of_queries(splits: Sequence[Split], trained_before: Tensor | None = None) -> dict[str, Tensor]:
    """Which of all queries [Q] are of classes that a split trains on ("seen"), and which not; empty if all are of one kind."""
    trained = _joined(splits, "train", "labels")
    if trained_before is not None:
        trained = torch.cat([trained_before, trained])
    is_seen = torch.isin(_joined(splits, "query", "labels"), trained)
    return {} if bool(is_seen.all()) or not bool(is_seen.any()) else {"seen": is_seen, "unseen": ~is_seen}


def _joined(splits: Sequence[Split], part: str, name: str) -> Tensor:
    """The labels or ids of one part of all splits."""
    return torch.cat([getattr(getattr(split, part), name) for split in splits])
