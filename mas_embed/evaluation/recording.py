"""What a training records for its report: the neighbours of a sample of queries, scores by class, a map of embeddings.

Q recorded queries, K neighbours, R evaluations, C classes, M items of the map, P parameters, T splits, S splits of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["item", "label"]
Array = NDArray[Any]

NONE = -1  # in place of a position or a label: there is none
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of importance


class Confusion(NamedTuple):
    """A class whose queries find another class first.

    Attributes:
        label: the class of the queries.
        nearest: the class of the item that is nearest to them.
        learned: the number of such queries when their split was learned.
        now: the number of such queries at the last evaluation.
        num_queries: the recorded queries of the class.
        split: of the class of the queries.
        nearest_split: of the item that is nearest, -1 if it is not known; a later split if an old class is taken for a new one.
    """

    label: int
    nearest: int
    learned: int
    now: int
    num_queries: int
    split: int
    nearest_split: int


@dataclass(frozen=True)
class RecordedNeighbours:
    """The K nearest of every query, nearest first; -1 and NaN where there are fewer, or where the query is not learned yet.

    Attributes:
        split: [Q, K] of the gallery item, or of the class.
        index: [Q, K] the position in `splits[split].gallery`; -1 for classes.
        label: [Q, K] the class.
        similarity: [Q, K] higher is nearer, see `RecordedQueries.similarity_name`.
    """

    split: Array
    index: Array
    label: Array
    similarity: Array


@dataclass(frozen=True)
class RecordedQueries:
    """A sample of queries, which is the same for every method and seed, when their split was learned and now.

    Attributes:
        kind: what a query is: an "item", or a "label", which is a class as a whole.
        neighbour_kind: what it finds: items of the gallery, or labels.
        score_name: of `scores`, such as "average precision".
        similarity_name: of `RecordedNeighbours.similarity`, such as "cosine".
        split: [Q] of the query.
        index: [Q] the position in `splits[split].query`; -1 for labels.
        label: [Q] the class of the query.
        rows: [R] after which splits was evaluated.
        scores: [R, Q] of the queries after these splits, also of those that were not learned yet; NaN where not measured.
        score_learned: [Q] at the first evaluation after the split of the query was learned; NaN before.
        score_now: [Q] at the last evaluation; NaN if the split is not learned yet.
        learned: the neighbours at the first evaluation after the split of the query was learned.
        now: the neighbours at the last evaluation.
    """

    kind: Kind
    neighbour_kind: Kind
    score_name: str
    similarity_name: str
    split: Array
    index: Array
    label: Array
    rows: Array
    scores: Array
    score_learned: Array
    score_now: Array
    learned: RecordedNeighbours
    now: RecordedNeighbours

    @property
    def fall(self) -> Array:
        """[Q] by how much the score has fallen since the split was learned; NaN where it is not learned yet."""
        return self.score_learned - self.score_now

    @property
    def is_learned(self) -> Array:
        """[Q] whether the split of the query is learned."""
        return ~np.isnan(self.score_now)

    @property
    def learned_is_right(self) -> Array:
        """[Q, K] whether a neighbour was of the class of the query when it was learned."""
        return self.learned.label == self.label[:, None]

    @property
    def now_is_right(self) -> Array:
        """[Q, K] whether a neighbour is of the class of the query now."""
        return self.now.label == self.label[:, None]

    def confusions(self, most: int = 50) -> list[Confusion]:
        """The pairs of classes that are confused more often than when they were learned, the most frequent new ones first."""
        learned, now = self._confused(self.learned), self._confused(self.now)
        nearest_splits = {pair[:2]: pair[2] for pair in (*learned, *now)}
        counts = [Counter({pair[:2]: number for pair, number in one.items()}) for one in (learned, now)]
        num_queries = Counter(self.label[self.is_learned].tolist())
        split_of = dict(zip(self.label[::-1].tolist(), self.split[::-1].tolist(), strict=True))
        found = [
            Confusion(label, nearest, counts[0][label, nearest], number, num_queries[label], split_of[label], where)
            for (label, nearest), number in counts[1].items()
            if number > counts[0][label, nearest]
            for where in [nearest_splits[label, nearest]]
        ]
        return sorted(found, key=lambda one: (one.learned - one.now, -one.now, one.label, one.nearest))[:most]

    def _confused(self, neighbours: RecordedNeighbours) -> Counter[tuple[int, int, int]]:
        """The number of learned queries by their class, the other class of their nearest neighbour, and its split."""
        nearest = neighbours.label[:, 0]
        is_confused = self.is_learned & (nearest != self.label) & (nearest != NONE)
        triples = (self.label[is_confused], nearest[is_confused], neighbours.split[is_confused, 0])
        return Counter(zip(*(values.tolist() for values in triples), strict=True))


@dataclass(frozen=True)
class RecordedClasses:
    """The scores of every class, over all of its queries, when its split was learned and now.

    Attributes:
        score_name: of `learned` and `now`, such as "average precision".
        label: [C]; a class that is in two splits is there twice.
        split: [C] of the queries.
        num_queries: [C].
        learned: [C] the mean over the queries at the first evaluation after the split was learned; NaN before.
        now: [C] the same at the last evaluation.
    """

    score_name: str
    label: Array
    split: Array
    num_queries: Array
    learned: Array
    now: Array


@dataclass(frozen=True)
class EmbeddingMap:
    """A sample of gallery items in the embedding space, when their split was learned and now.

    All coordinates are along the principal components of the items of both times together, the largest first: the first two
    columns are a picture. Rows are NaN where the split is not learned yet.

    Attributes:
        split: [M] of the item.
        index: [M] the position in `splits[split].gallery`.
        label: [M] the class.
        learned: [M, d] at the first evaluation after the split was learned.
        now: [M, d] at the last evaluation.
        mean_label: [C] classes, of which all gallery items of the split are averaged.
        mean_split: [C].
        mean_learned: [C, d].
        mean_now: [C, d].
        explained: [d] the share of the variance of the items that a component explains.
    """

    split: Array
    index: Array
    label: Array
    learned: Array
    now: Array
    mean_label: Array
    mean_split: Array
    mean_learned: Array
    mean_now: Array
    explained: Array


@dataclass(frozen=True)
class RecordedParameters:
    """How important every parameter is to what was learned, and how far it moved from where it was.

    Attributes:
        names: [P] of the parameters; what comes before the last dot is the layer.
        num_values: [P].
        splits: [T] whose training has ended, by index.
        importance: [T, P] the sum over the values of a parameter of the importance that protected it during the split; 0 before
            the method has consolidated.
        moved: [T, P] `|theta - anchor|^2` when the training on the split ended; NaN without an anchor.
        anchor_norm: [T, P] `|anchor|^2`; NaN without an anchor.
        pull: [T, P] `sum importance (theta - anchor)^2`, the part of the parameter in the penalty, without its strength; NaN
            without an anchor.
        importance_now: [P] the sum over the values, after the last split.
        quantiles: [P, 5] of the importance of single values after the last split, at the levels `QUANTILES`.
    """

    names: list[str]
    num_values: Array
    splits: Array
    importance: Array
    moved: Array
    anchor_norm: Array
    pull: Array
    importance_now: Array
    quantiles: Array

    def layers(self) -> dict[str, list[int]]:
        """By the name of a layer the positions of its parameters."""
        layers: dict[str, list[int]] = {}
        for position, name in enumerate(self.names):
            layers.setdefault(name.rpartition(".")[0] or name, []).append(position)
        return layers


@dataclass(frozen=True)
class Observations:
    """What an evaluator has recorded of a training so far.

    Attributes:
        queries: with their neighbours.
        classes: with their scores.
        map: of embeddings; None for an evaluator without embeddings.
    """

    queries: RecordedQueries
    classes: RecordedClasses
    map: EmbeddingMap | None = None


@dataclass(frozen=True)
class Recording:
    """What was recorded of one method and seed.

    Attributes:
        method: its title.
        seed: of the training.
        folder: of the training inside the run directory, such as "mas/seed0".
        splits: the names of the splits that were evaluated, [S].
        after: the index of the split that was learned last.
        queries: None if the evaluator records none, as are `classes` and `map`.
        classes: the scores by class.
        map: of embeddings.
        parameters: None if the method does not pull parameters towards an anchor.
        memory: bytes: "process_peak", the largest resident memory that the process had had by then, and "cuda_peak", that of the
            training on a GPU.
    """

    method: str
    seed: int
    folder: str
    splits: list[str]
    after: int
    queries: RecordedQueries | None = None
    classes: RecordedClasses | None = None
    map: EmbeddingMap | None = None
    parameters: RecordedParameters | None = None
    memory: dict[str, int] = field(default_factory=dict)


class QueriesToShow(NamedTuple):
    """Positions among the recorded queries.

    Attributes:
        fallen: those whose score fell most, the largest fall first.
        improved: those whose score rose most, the largest rise first.
    """

    fallen: list[int]
    improved: list[int]


def first_seeds(recordings: Sequence[Recording]) -> list[Recording]:
    """The recording of the first seed of every method, of those with queries; methods stay in their order."""
    first: dict[str, Recording] = {}
    for recording in recordings:
        known = first.get(recording.method)
        if recording.queries is not None and (known is None or recording.seed < known.seed):
            first[recording.method] = recording
    return list(first.values())


def queries_to_show(
    recordings: Sequence[Recording], *, most_fallen: int = 24, most_improved: int = 12
) -> QueriesToShow:
    """The queries whose scores have changed most, on average over the first seeds of the methods.

    A method that has not learned the split of a query yet, does not count for it.
    """
    falls = [one.queries.fall for one in first_seeds(recordings) if one.queries is not None]
    if not falls or len({len(fall) for fall in falls}) > 1:
        return QueriesToShow([], [])
    stacked = np.stack(falls).astype(np.float64)
    is_measured = ~np.isnan(stacked)
    mean = np.where(is_measured, stacked, 0).sum(0) / np.maximum(is_measured.sum(0), 1)
    order = np.argsort(-mean, kind="stable")
    fallen = order[mean[order] > 0][:most_fallen]
    improved = np.argsort(mean, kind="stable")
    improved = improved[mean[improved] < 0][:most_improved]
    return QueriesToShow(fallen.tolist(), improved.tolist())
