"""Collects what is recorded of a sample of queries and of gallery items, from one evaluation to the next.

What is sampled depends on the splits alone, so that it is the same for every method and every seed. S splits, Q recorded
queries, K neighbours, G gallery items of all splits, N rows of something that is recorded, D embedding size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mas_embed.evaluation.embedding_map import MapRecorder
from mas_embed.evaluation.learned_and_now import LearnedAndNow, as_arrays, as_tensors
from mas_embed.evaluation.recording import (
    NONE,
    Array,
    Kind,
    Observations,
    RecordedClasses,
    RecordedNeighbours,
    RecordedQueries,
)
from mas_embed.retrieval import NearestItems

MOST_QUERIES = 2048  # that are recorded in all
MOST_PAIRS = 2**27  # of a recorded query and a gallery item, so that their neighbours cost little
MOST_CLASSES = 10_000  # whose scores are recorded
NUM_NEIGHBOURS = 5
SAMPLE_SEED = 0
_SAMPLE_TYPES: dict[str, type] = {"split": np.int32, "index": np.int32, "label": np.int64}


@dataclass(frozen=True)
class Described:
    """What an evaluator records, in words.

    Attributes:
        score_name: of the score of a query, such as "average precision".
        similarity_name: of the similarity of a neighbour, such as "cosine".
        kind: what a query is.
        neighbour_kind: what a query finds.
    """

    score_name: str
    similarity_name: str
    kind: Kind = "item"
    neighbour_kind: Kind = "item"


@dataclass(frozen=True)
class Found:
    """The nearest of every recorded query of the evaluated splits, nearest first.

    Attributes:
        split: [q, k] of the neighbour; -1 for none, or if it is not known.
        index: [q, k] in the gallery of its split; -1 for none, or for a class.
        label: [q, k] its class; -1 for none.
        similarity: [q, k] NaN for none.
    """

    split: Array
    index: Array
    label: Array
    similarity: Array


class Recorder:
    """Records the neighbours of a sample of queries, the scores of classes and a map of embeddings, when learned and now.

    Args:
        num_queries: the number of queries of a split that are recorded, fewer if there are many splits; 0 to record nothing.
        described: what is recorded, in words.
        unit_length: whether the map is of embeddings of unit length.
    """

    def __init__(self, num_queries: int, described: Described, *, unit_length: bool = False) -> None:
        self.num_queries, self.described, self._unit_length = num_queries, described, unit_length
        self.forget()

    def forget(self) -> None:
        """Begins anew, with a sample of the splits that are evaluated next."""
        # Split, index and label of the recorded queries
        self._sample: dict[str, Array] = {name: np.zeros(0, kind) for name, kind in _SAMPLE_TYPES.items()}
        self._rows: list[int] = []
        self._scores: list[Array] = []
        self._neighbours, self._classes = LearnedAndNow(), LearnedAndNow()
        self._map = MapRecorder(unit_length=self._unit_length)
        self._class_sizes: dict[str, Array] = {}
        self._is_stopped = False

    @property
    def is_recording(self) -> bool:
        """Whether anything is recorded."""
        return self.num_queries > 0 and not self._is_stopped

    def begin(self, query_labels: Sequence[Tensor], gallery_labels: Sequence[Tensor] | None = None) -> None:
        """Draws the sample of the splits that have none yet.

        Stops recording for good if the other splits are not those that were sampled, as where the data of learned ones is gone.

        Args:
            query_labels: the labels of the queries of every split.
            gallery_labels: those of the gallery of every split, for the map; None for no map.
        """
        if not self.is_recording:
            return
        if not self._is_sample_of(query_labels):
            self.forget()
            self._is_stopped = True
            return
        num_sampled = int(self._sample["split"].max(initial=-1)) + 1
        if len(query_labels) <= num_sampled:
            return
        num_items = sum(map(len, gallery_labels or ()))
        size = min(MOST_QUERIES, MOST_PAIRS // max(num_items, 1)) // len(query_labels)
        size = min(self.num_queries, max(size, 1))
        for split in range(num_sampled, len(query_labels)):
            labels = query_labels[split].numpy()
            drawn = np.sort(np.random.default_rng([SAMPLE_SEED, split]).permutation(len(labels))[:size])
            new = {"split": np.full_like(drawn, split), "index": drawn, "label": labels[drawn]}
            self._sample = {
                name: np.concatenate([values, new[name].astype(values.dtype)]) for name, values in self._sample.items()
            }
        missing = [len(self._sample["split"]) - len(scores) for scores in self._scores]
        self._scores = [
            np.pad(scores, (0, number), constant_values=np.nan)
            for scores, number in zip(self._scores, missing, strict=True)
        ]
        if gallery_labels is not None:
            self._map.begin([labels.numpy() for labels in gallery_labels], first_split=num_sampled)

    def _is_sample_of(self, query_labels: Sequence[Tensor]) -> bool:
        """Whether the queries of these splits have the labels that the sampled ones of them had."""
        for split, labels in enumerate(query_labels):
            is_of_split = self._sample["split"] == split
            index, expected = self._sample["index"][is_of_split], self._sample["label"][is_of_split]
            if index.max(initial=-1) >= len(labels) or (labels.numpy()[index] != expected).any():
                return False
        return True

    def sample_of(self, split: int) -> Array:
        """The positions of the recorded queries among the queries of a split."""
        return self._sample["index"][self._sample["split"] == split]

    def positions(self, sizes: Sequence[int]) -> Array:
        """[q] the recorded queries among all queries of the first splits, whose numbers of queries are given."""
        starts = np.cumsum([0, *sizes])
        is_evaluated = self._sample["split"] < len(sizes)
        return starts[self._sample["split"][is_evaluated]] + self._sample["index"][is_evaluated]

    def record(
        self,
        split_index: int,
        query_labels: Sequence[Tensor],
        scores: Array,
        found: Found,
        gallery: Tensor | None = None,
        gallery_labels: Sequence[Tensor] = (),
    ) -> None:
        """Records an evaluation of the first splits of the sequence.

        Args:
            split_index: of the split that was learned last.
            query_labels: the labels of all queries of every split that was evaluated.
            scores: of all of these queries, of one split after another; NaN where a query has none.
            found: of the recorded queries, see `positions`.
            gallery: [G, D] the embeddings of the galleries of all evaluated splits, for the map; None for no map.
            gallery_labels: the labels of the gallery of every split.
        """
        positions = self.positions([len(labels) for labels in query_labels])
        row = np.full(len(self._sample["split"]), np.nan, np.float32)
        row[: len(positions)] = scores[positions]
        if self._rows and self._rows[-1] == split_index:  # evaluated once more
            self._rows.pop(), self._scores.pop()
        self._rows.append(split_index)
        self._scores.append(row)
        self._neighbours.update(
            self._sample["split"],
            split_index,
            score=row[: len(positions)],
            split=_filled(found.split.astype(np.int32), NONE),
            index=_filled(found.index.astype(np.int32), NONE),
            label=_filled(found.label.astype(np.int64), NONE),
            similarity=_filled(found.similarity.astype(np.float32), np.nan),
        )
        self._record_classes(split_index, query_labels, scores)
        if gallery is not None:
            self._map.record(split_index, gallery, [labels.numpy() for labels in gallery_labels])

    def observations(self) -> Observations | None:
        """A copy of what is recorded so far; None before the first split is learned."""
        if not self._rows:
            return None
        learned, now = (copy.deepcopy(values) for values in (self._neighbours.learned, self._neighbours.now))
        described = self.described
        queries = RecordedQueries(
            kind=described.kind,
            neighbour_kind=described.neighbour_kind,
            score_name=described.score_name,
            similarity_name=described.similarity_name,
            split=self._sample["split"],
            index=self._sample["index"] if described.kind == "item" else np.full_like(self._sample["index"], NONE),
            label=self._sample["label"],
            rows=np.array(self._rows, np.int32),
            scores=np.stack(self._scores),
            score_learned=learned.pop("score"),
            score_now=now.pop("score"),
            learned=RecordedNeighbours(**learned),
            now=RecordedNeighbours(**now),
        )
        classes = RecordedClasses(
            score_name=described.score_name,
            **self._class_sizes,
            learned=self._classes.learned["score"].copy(),
            now=self._classes.now["score"].copy(),
        )
        return Observations(queries, classes, self._map.as_map())

    def state_dict(self) -> dict[str, Any]:
        """Everything that is recorded so far."""
        return {
            "sample": as_tensors(self._sample),
            "rows": list(self._rows),
            "scores": as_tensors({str(row): scores for row, scores in zip(self._rows, self._scores, strict=True)}),
            "neighbours": self._neighbours.state_dict(),
            "class_sizes": as_tensors(self._class_sizes),
            "classes": self._classes.state_dict(),
            "map": self._map.state_dict(),
            "is_stopped": self._is_stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; nothing is recorded of what came before, if it is empty."""
        self.forget()
        if not state:
            return
        self._sample, self._class_sizes = as_arrays(state["sample"]), as_arrays(state["class_sizes"])
        self._rows = [int(row) for row in state["rows"]]
        self._is_stopped = bool(state["is_stopped"])
        self._scores = [as_arrays(state["scores"])[str(row)] for row in self._rows]
        for part, name in ((self._neighbours, "neighbours"), (self._classes, "classes"), (self._map, "map")):
            part.load_state_dict(state[name])

    def _record_classes(self, split_index: int, query_labels: Sequence[Tensor], scores: Array) -> None:
        """The mean score of the queries of every class of every split."""
        pairs, inverse = _classes_of(query_labels)
        is_scored = ~np.isnan(scores)
        sums = np.bincount(inverse[is_scored], scores[is_scored], len(pairs))
        counts = np.bincount(inverse[is_scored], minlength=len(pairs))
        with np.errstate(invalid="ignore"):
            means = (sums / counts).astype(np.float32)[:MOST_CLASSES]
        if len(means) > len(self._class_sizes.get("label", ())):  # of more splits than before
            self._class_sizes = {
                "split": pairs[:MOST_CLASSES, 0].astype(np.int32),
                "label": pairs[:MOST_CLASSES, 1].copy(),
                "num_queries": np.bincount(inverse)[:MOST_CLASSES].astype(np.int32),
            }
        self._classes.update(self._class_sizes["split"], split_index, score=means)


def found_items(nearest: NearestItems, gallery_labels: Sequence[Tensor]) -> Found:
    """What was found in the galleries of several splits together, from the labels of each."""
    starts = np.cumsum([0, *map(len, gallery_labels)])
    positions = nearest.positions.cpu().numpy()
    splits = np.searchsorted(starts, positions, side="right") - 1
    indices = np.where(positions < 0, NONE, positions - starts[splits])
    labels = torch.cat(list(gallery_labels)).numpy()[positions]
    return Found(splits, indices, np.where(positions < 0, NONE, labels), nearest.similarities.cpu().numpy())


def _split_of_each(values: Sequence[Any]) -> Array:
    """The index of the split of every value of all splits together."""
    return np.repeat(np.arange(len(values)), [len(of_split) for of_split in values])


def _classes_of(labels: Sequence[Tensor]) -> tuple[Array, Array]:
    """The splits and labels [C, 2] of the classes of every split, in order, and the class [Q] of every query."""
    pairs, inverses, num_classes = [], [], 0
    for split, of_split in enumerate(labels):
        classes, inverse = np.unique(of_split.numpy(), return_inverse=True)
        pairs.append(np.stack([np.full_like(classes, split), classes], axis=1))
        inverses.append(inverse + num_classes)
        num_classes += len(classes)
    return np.concatenate(pairs), np.concatenate(inverses)


def _filled(values: Array, fill: float) -> Array:
    """The first K columns, with further ones where there are fewer."""
    missing = np.full((len(values), max(NUM_NEIGHBOURS - values.shape[1], 0)), fill, values.dtype)
    return np.concatenate([values, missing], axis=1)[:, :NUM_NEIGHBOURS]
