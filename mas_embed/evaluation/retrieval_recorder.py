"""Records what a report shows of retrieval, from the embeddings that an evaluation has made anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_embed.data import Split
from mas_embed.evaluation.recorder import NUM_NEIGHBOURS, Described, Found, Recorder, found_items
from mas_embed.evaluation.recording import Array
from mas_embed.retrieval import Distance, nearest_items

SIMILARITIES: dict[Distance, str] = {
    "cosine": "cosine",
    "euclidean": "negative squared distance",
    "inner_product": "inner product",
}


class RetrievalRecorder(Recorder):
    """Records queries that are ranked against the gallery of all splits.

    Args:
        num_queries: the number of queries of a split that are recorded; 0 to record nothing.
        distance: by which items are ranked.
    """

    def __init__(self, num_queries: int, distance: Distance) -> None:
        self.distance = distance
        described = Described("average precision", SIMILARITIES[distance])
        super().__init__(num_queries, described, unit_length=distance == "cosine")

    def begin_sequence(self, splits: Sequence[Split]) -> None:
        """Forgets what was recorded, and draws the sample of these splits."""
        self.forget()
        self.begin([split.query.labels for split in splits], [split.gallery.labels for split in splits])

    def record_evaluation(
        self,
        splits: Sequence[Split],
        split_index: int,
        queries: Sequence[Tensor],
        galleries: Sequence[Tensor],
        average_precision: Array,
    ) -> None:
        """Records an evaluation.

        Args:
            splits: that were evaluated.
            split_index: of the split that was learned last.
            queries: the embeddings of the queries of every split.
            galleries: the embeddings of the gallery of every split.
            average_precision: of all queries; NaN for one without a relevant item.
        """
        query_labels = [split.query.labels for split in splits]
        gallery_labels = [split.gallery.labels for split in splits]
        self.begin(query_labels, gallery_labels)
        if not self.is_recording:
            return
        positions = torch.from_numpy(self.positions([len(labels) for labels in query_labels]))
        gallery = torch.cat(list(galleries))
        found = self._nearest(splits, torch.cat(list(queries))[positions], positions, gallery)
        self.record(split_index, query_labels, average_precision, found, gallery, gallery_labels)

    def _nearest(self, splits: Sequence[Split], queries: Tensor, positions: Tensor, gallery: Tensor) -> Found:
        """The items that are nearest to the recorded queries, which are at positions among all queries."""
        ids = torch.cat([split.query.ids for split in splits])[positions]
        gallery_ids = torch.cat([split.gallery.ids for split in splits])
        nearest = nearest_items(
            queries, gallery, NUM_NEIGHBOURS, distance=self.distance, query_ids=ids, gallery_ids=gallery_ids
        )
        return found_items(nearest, [split.gallery.labels for split in splits])
