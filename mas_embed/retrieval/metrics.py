"""Retrieval scores: exact over the full ranking, by blocks of queries.

Q queries, G gallery items, B queries of a block, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.search import Distance, comparable, find_nearest

BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the queries that have a relevant item, and the values of each query.

    Attributes:
        mean_average_precision: over the full ranking; equal scores are one group.
        mean_average_precision_at_r: of the R nearest only, divided by R; R is the number of relevant items.
        r_precision: share of relevant items among the R nearest.
        mean_reciprocal_rank: of the first relevant item.
        precision_at_1: share of queries whose nearest item is relevant.
        recall_at: by K, share of queries with a relevant item among the K nearest.
        per_query: the same by name ("average_precision", "average_precision_at_r", "r_precision", "reciprocal_rank",
            "precision_at_1", "recall_at_<K>"), each [Q], NaN for a query without a relevant item.
        num_queries: Q, those without a relevant item included.
        num_skipped: queries without a relevant item, left out of every mean.
    """

    mean_average_precision: float
    mean_average_precision_at_r: float
    r_precision: float
    mean_reciprocal_rank: float
    precision_at_1: float
    recall_at: dict[int, float]
    per_query: dict[str, NDArray[np.float64]]
    num_queries: int
    num_skipped: int

    def as_dict(self) -> dict[str, float]:
        """Every mean by name, recall at K as `recall_at_<K>`."""
        names = (
            "mean_average_precision",
            "mean_average_precision_at_r",
            "r_precision",
            "mean_reciprocal_rank",
            "precision_at_1",
        )
        return {name: getattr(self, name) for name in names} | {
            f"recall_at_{k}": value for k, value in self.recall_at.items()
        }


def evaluate_retrieval(
    queries: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor | None = None,
    gallery_labels: ArrayLike | Tensor | None = None,
    *,
    query_ids: ArrayLike | Tensor | None = None,
    gallery_ids: ArrayLike | Tensor | None = None,
    distance: Distance = "cosine",
    recall_at: Sequence[int] = (1, 2, 4, 8),
) -> RetrievalScores:
    """Ranks the gallery for every query and scores the rankings; an item is relevant if it has the query's label.

    Average precision of a query with R relevant items is `1/R sum_r #(relevant with score >= s_r) / #(all with score >=
    s_r)`: equal scores are one group, so it does not depend on the order of the gallery (scikit-learn's definition). It
    and the reciprocal rank come from the full ranking; the other measures from the nearest neighbours that FAISS finds
    in float32. Wherever a rank has to be given to items of equal score, irrelevant ones come first: no measure gains by
    ties, and none depends on the order of the gallery.

    Args:
        queries: [Q, D], finite.
        query_labels: [Q] integers.
        gallery: [G, D]. None: the queries are the gallery, and each query's own item is left out.
        gallery_labels: [G] integers; given exactly when the gallery is.
        query_ids: [Q] integers that tell which item a query is; with `gallery_ids`, gallery items with the query's id
            are left out.
        gallery_ids: [G] integers.
        distance: "cosine", "euclidean" or "inner_product" (higher is nearer).
        recall_at: the K of recall at K, each >= 1; a K beyond the gallery takes all of it.

    Returns:
        Means in [0, 1] and per-query values. Queries without a relevant item are left out of the means and counted.

    Raises:
        UserError: shapes that do not fit, labels that are not integers, embeddings that are not finite (or zero under
            "cosine"), an empty gallery, or no query with a relevant item.

    O(Q G (D + log G)) time, O(Q + G) memory beyond a block of about 4 million scores.

    Example:
        >>> scores = evaluate_retrieval([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.2]], [0, 0, 1, 1])
        >>> round(scores.mean_average_precision, 3), scores.precision_at_1
        (0.833, 0.75)
    """
    if (gallery is None) != (gallery_labels is None):
        raise UserError(
            "gallery and gallery_labels go together: give both, or neither to rank the queries among themselves"
        )
    if (query_ids is None) != (gallery_ids is None) or (gallery is None and query_ids is not None):
        raise UserError("query_ids and gallery_ids go together, beside a gallery")
    queries_QD, query_labels_Q = _embeddings(queries, "queries"), _integers(query_labels, "query_labels")
    if gallery is None:
        gallery_GD, gallery_labels_G = queries_QD, query_labels_Q
        query_ids_Q = gallery_ids_G = torch.arange(len(queries_QD))
    else:
        gallery_GD, gallery_labels_G = _embeddings(gallery, "gallery"), _integers(gallery_labels, "gallery_labels")
        # With no ids given, ids that never meet
        query_ids_Q = torch.full((len(queries_QD),), -1) if query_ids is None else _integers(query_ids, "query_ids")
        gallery_ids_G = torch.arange(len(gallery_GD)) if gallery_ids is None else _integers(gallery_ids, "gallery_ids")
    _refuse_bad_sizes(queries_QD, gallery_GD, query_labels_Q, gallery_labels_G, query_ids_Q, gallery_ids_G, recall_at)
    ranking = _Ranking(queries_QD, gallery_GD, query_labels_Q, gallery_labels_G, query_ids_Q, gallery_ids_G, distance)
    return _summarise(ranking, tuple(recall_at))


class _Ranking:
    """The gallery as every query ranks it; scores exist for a block of queries at a time.

    Scores are computed in float64 and compared in the precision of the embeddings, so that equal scores are equal
    whatever the order, the block, and the library's way of adding up.

    Attributes:
        num_relevant: [Q], without the query's own item.
    """

    def __init__(
        self,
        queries: Tensor,
        gallery: Tensor,
        labels: Tensor,
        gallery_labels: Tensor,
        ids: Tensor,
        gallery_ids: Tensor,
        distance: Distance,
    ) -> None:
        self._queries, self._gallery = comparable(queries, gallery, distance)
        self._precision = torch.promote_types(queries.dtype, gallery.dtype)
        self._labels, self._gallery_labels, self._ids, self._gallery_ids = (
            tensor.to(queries.device) for tensor in (labels, gallery_labels, ids, gallery_ids)
        )
        self._distance = distance
        blocks = list(_blocks(len(queries), len(gallery)))
        self.num_relevant = torch.cat([self._is_relevant(block).sum(1) for block in blocks])
        self._max_own = int(max(self._is_own(block).sum(1).max() for block in blocks))

    def __len__(self) -> int:
        return len(self._queries)

    def full(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of queries: their indices [B], scores [B, G] (own items -inf), and whether an item is relevant [B, G]."""
        for block in _blocks(len(self), len(self._gallery)):
            yield block, self._scores(block), self._is_relevant(block)

    def relevance_of_nearest(self, k: int) -> Tensor:
        """Whether the items at the first k ranks are relevant [Q, min(k, G)]; irrelevant ones first among equals.

        FAISS finds candidates in float32; their scores are then computed like all others. Where its rounding could have
        kept an item out of the first k, or a group of equal scores straddles the cut, the query is ranked in full.
        """
        num_gallery = len(self._gallery)
        # One more than asked for, to see past the cut, and the query's own items, which go
        wanted = min(k + 1 + self._max_own, num_gallery)
        found, positions = find_nearest(self._queries, self._gallery, wanted, distance=self._plain_distance)
        last, candidates = (torch.from_numpy(array).to(self._labels.device) for array in (found[:, -1], positions))
        nearest = torch.zeros(len(self), min(k, num_gallery), dtype=torch.bool, device=self._labels.device)
        for block in torch.arange(len(self)).split(_block_size(wanted * self._gallery.shape[1])):
            scores, is_relevant = self._scores(block, candidates[block]), self._is_relevant(block, candidates[block])
            nearest[block] = _by_rank(scores, is_relevant)[:, :k]
            if wanted < num_gallery:
                kth = scores.sort(dim=1, descending=True).values[:, k - 1]
                unsure = block[(kth <= last[block] + self._search_error(block)).cpu()]
                for part in unsure.split(_block_size(num_gallery)):
                    nearest[part] = _by_rank(self._scores(part), self._is_relevant(part))[:, :k]
        return nearest

    @property
    def _plain_distance(self) -> Distance:
        """How prepared rows are compared: cosine is the inner product of unit rows."""
        return "euclidean" if self._distance == "euclidean" else "inner_product"

    def _search_error(self, block: Tensor) -> Tensor:
        """A bound [B] on the rounding of FAISS's float32 scores."""
        lengths, longest = self._queries[block].norm(dim=1), self._gallery.norm(dim=1).max()
        return 1e-5 * ((lengths + longest).square() if self._distance == "euclidean" else lengths * longest)

    def _scores(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        """Scores of a block of queries for all gallery items [B, G], or for the items at `positions` [B, K]; own items -inf."""
        queries_B1D = self._queries[block].double().unsqueeze(1)
        gallery = self._gallery.double().unsqueeze(0) if positions is None else self._gallery[positions].double()
        inner = (queries_B1D @ gallery.mT)[:, 0] if positions is not None else queries_B1D[:, 0] @ gallery[0].T
        if self._distance == "euclidean":
            inner = -(queries_B1D.square().sum(2) + gallery.square().sum(2) - 2 * inner).clamp_min(0)
        return inner.to(self._precision).masked_fill(self._is_own(block, positions), -torch.inf)

    def _is_own(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._ids[block, None] == (self._gallery_ids if positions is None else self._gallery_ids[positions])

    def _is_relevant(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        labels = self._gallery_labels if positions is None else self._gallery_labels[positions]
        return (self._labels[block, None] == labels) & ~self._is_own(block, positions)


def _summarise(ranking: _Ranking, recall_at: tuple[int, ...]) -> RetrievalScores:
    is_scored = ranking.num_relevant > 0
    if not bool(is_scored.any()):
        raise UserError("no query has a relevant item in the gallery: no gallery item, itself aside, has its label")
    values = _full_ranking_measures(ranking) | _nearest_measures(ranking, recall_at)
    per_query = {
        name: value.masked_fill(~is_scored, torch.nan).double().cpu().numpy() for name, value in values.items()
    }
    mean = {name: float(np.nanmean(value)) for name, value in per_query.items()}
    return RetrievalScores(
        mean_average_precision=mean["average_precision"],
        mean_average_precision_at_r=mean["average_precision_at_r"],
        r_precision=mean["r_precision"],
        mean_reciprocal_rank=mean["reciprocal_rank"],
        precision_at_1=mean["precision_at_1"],
        recall_at={k: mean[f"recall_at_{k}"] for k in recall_at},
        per_query=per_query,
        num_queries=len(ranking),
        num_skipped=int((~is_scored).sum()),
    )


def _full_ranking_measures(ranking: _Ranking) -> dict[str, Tensor]:
    """Average precision and reciprocal rank [Q], from all scores."""
    precision = torch.zeros(len(ranking), dtype=torch.float64, device=ranking.num_relevant.device)
    reciprocal = torch.zeros_like(precision)
    for block, scores, is_relevant in ranking.full():
        scores, order = scores.sort(dim=1, descending=True)
        is_relevant = is_relevant.gather(1, order)
        group_end = _end_of_equals(scores)
        num_relevant_BG = is_relevant.cumsum(1).gather(1, group_end)  # relevant with a score at least as high
        at_least_BG = group_end + 1  # all with a score at least as high
        total = (num_relevant_BG / at_least_BG.double()).masked_fill(~is_relevant, 0).sum(1)
        precision[block] = total / ranking.num_relevant[block].clamp_min(1)
        first = is_relevant.int().argmax(1, keepdim=True)
        num_ahead = (at_least_BG - num_relevant_BG).gather(1, first)[:, 0]  # irrelevant ones, equals included
        reciprocal[block] = 1 / (1 + num_ahead.double())
    return {"average_precision": precision, "reciprocal_rank": reciprocal}


def _nearest_measures(ranking: _Ranking, recall_at: tuple[int, ...]) -> dict[str, Tensor]:
    """The measures that are cut at a rank [Q], from the nearest neighbours."""
    nearest = ranking.relevance_of_nearest(max(*recall_at, int(ranking.num_relevant.max()), 1))
    hits = nearest.cumsum(1).double()
    ranks = torch.arange(1, nearest.shape[1] + 1, device=nearest.device)
    within_r = ranks <= ranking.num_relevant[:, None]
    num_relevant = ranking.num_relevant.clamp_min(1)
    measures = {
        "precision_at_1": nearest[:, 0].double(),
        "r_precision": (nearest & within_r).sum(1) / num_relevant.double(),
        "average_precision_at_r": (hits / ranks * (nearest & within_r)).sum(1) / num_relevant,
    }
    return measures | {f"recall_at_{k}": nearest[:, :k].any(1).double() for k in recall_at}


def _by_rank(scores: Tensor, is_relevant: Tensor) -> Tensor:
    """`is_relevant` [B, K] in the order of falling scores, irrelevant items first among equals."""
    order = is_relevant.int().argsort(dim=1, stable=True)
    scores, is_relevant = scores.gather(1, order), is_relevant.gather(1, order)
    return is_relevant.gather(1, scores.argsort(dim=1, descending=True, stable=True))


def _end_of_equals(sorted_scores: Tensor) -> Tensor:
    """For every position [B, G] the last position that has the same score."""
    size = sorted_scores.shape[1]
    positions = torch.arange(size, device=sorted_scores.device).expand_as(sorted_scores)
    is_last = torch.ones_like(sorted_scores, dtype=torch.bool)
    is_last[:, :-1] = sorted_scores[:, :-1] != sorted_scores[:, 1:]
    return positions.masked_fill(~is_last, size).flip(1).cummin(1).values.flip(1)


def _block_size(num_gallery: int) -> int:
    return max(1, BLOCK_ELEMENTS // num_gallery)


def _blocks(num_queries: int, num_gallery: int) -> Iterator[Tensor]:
    yield from torch.arange(num_queries).split(_block_size(num_gallery))


def _embeddings(values: ArrayLike | Tensor, name: str) -> Tensor:
    rows = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if rows.ndim != 2:
        raise UserError(f"{name} must have shape [N, D], got {list(rows.shape)}")
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _integers(values: ArrayLike | Tensor | None, name: str) -> Tensor:
    numbers = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise UserError(f"{name} must be integers of shape [N], got {numbers.dtype} of shape {list(numbers.shape)}")
    return numbers.long()


def _refuse_bad_sizes(
    queries: Tensor,
    gallery: Tensor,
    labels: Tensor,
    gallery_labels: Tensor,
    ids: Tensor,
    gallery_ids: Tensor,
    recall_at: Sequence[int],
) -> None:
    if len(queries) == 0 or len(gallery) == 0:
        raise UserError(
            f"there must be queries and a gallery, got {len(queries)} queries and {len(gallery)} gallery items"
        )
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries have {queries.shape[1]} dimensions and the gallery {gallery.shape[1]}; embed both with one model"
        )
    for name, rows, numbers in (("query", queries, labels), ("gallery", gallery, gallery_labels)):
        if len(rows) != len(numbers):
            raise UserError(f"there are {len(rows)} {name} embeddings but {len(numbers)} {name}_labels")
    for name, rows, numbers in (("query", queries, ids), ("gallery", gallery, gallery_ids)):
        if len(rows) != len(numbers):
            raise UserError(f"there are {len(rows)} {name} embeddings but {len(numbers)} {name}_ids")
    if any(k < 1 for k in recall_at):
        raise UserError(f"recall_at must hold ranks >= 1, got {tuple(recall_at)}")
