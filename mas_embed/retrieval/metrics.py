"""Retrieval scores: exact over the full ranking, by blocks of queries.

Q queries, G gallery items, B queries of a block, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.search import Distance, comparable, search_prepared

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

    Average precision of a query with R relevant items is
    `1/R sum_r #(relevant with score >= s_r) / #(all with score >= s_r)`: equal scores are one group, so it does not depend
    on the order of the gallery (scikit-learn's definition). Precision at 1 and recall at K come from the nearest neighbours
    that FAISS finds, every other measure from the full ranking. Wherever a rank has to be given to items of equal score,
    irrelevant ones come first: no measure gains by ties, and none depends on the order of the gallery. Scores are computed in
    float64, and are equal where they agree to 34 binary digits.

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

    O(Q G (D + log G)) time; a copy of the embeddings in float64 and a few blocks of about 4 million scores in memory.

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
    asked = _items("query", queries, query_labels, query_ids)
    searched = asked if gallery is None else _items("gallery", gallery, gallery_labels, gallery_ids)
    if query_ids is None and gallery is not None:
        asked = asked._replace(ids=-1 - asked.ids)  # with no ids given, ids that never meet
    recall_at = tuple(recall_at) if isinstance(recall_at, Iterable) else (recall_at,)
    _refuse_bad_sizes(asked, searched, recall_at)
    return _summarise(_Ranking(asked, searched, distance), tuple(map(int, recall_at)))


class _Items(NamedTuple):
    """Queries or a gallery: embeddings [N, D], labels [N] and ids [N]."""

    name: str
    rows: Tensor
    labels: Tensor
    ids: Tensor


def _items(
    name: str, rows: ArrayLike | Tensor, labels: ArrayLike | Tensor | None, ids: ArrayLike | Tensor | None
) -> _Items:
    """What was given as tensors; without ids every item is its position."""
    embeddings = _embeddings(rows, "queries" if name == "query" else name)
    numbers = torch.arange(len(embeddings)) if ids is None else _integers(ids, f"{name}_ids")
    return _Items(name, embeddings, _integers(labels, f"{name}_labels"), numbers)


class _Ranking:
    """The gallery as every query ranks it; scores exist for a block of queries at a time.

    Attributes:
        num_gallery: G.
        num_relevant: [Q], without the query's own item.
    """

    def __init__(self, queries: _Items, gallery: _Items, distance: Distance) -> None:
        self._queries, self._gallery = comparable(queries.rows, gallery.rows, distance)
        self._labels, self._gallery_labels, self._ids, self._gallery_ids = (
            tensor.to(queries.rows.device) for tensor in (queries.labels, gallery.labels, queries.ids, gallery.ids)
        )
        self._distance, self.num_gallery = distance, len(gallery.rows)
        blocks = list(_blocks(len(queries.rows), self.num_gallery))
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
        num_gallery = self.num_gallery
        # One more than asked for, to see past the cut, and the query's own items, which go
        wanted = min(k + 1 + self._max_own, num_gallery)
        found, positions = search_prepared(self._queries, self._gallery, wanted, self._distance)
        last, candidates = (torch.from_numpy(array).to(self._labels.device) for array in (found[:, -1], positions))
        nearest = torch.zeros(len(self), min(k, num_gallery), dtype=torch.bool, device=self._labels.device)
        for block in torch.arange(len(self)).split(_block_size(wanted * self._gallery.shape[1])):
            scores, is_relevant = self._scores(block, candidates[block]), self._is_relevant(block, candidates[block])
            scores, nearest_relevant = _by_rank(scores, is_relevant)
            nearest[block] = nearest_relevant[:, :k]
            if wanted < num_gallery:
                unsure = block[(scores[:, k - 1] <= last[block] + self._search_error(block)).cpu()]
                for part in unsure.split(_block_size(num_gallery)):
                    nearest[part] = _by_rank(self._scores(part), self._is_relevant(part))[1][:, :k]
        return nearest

    def _search_error(self, block: Tensor) -> Tensor:
        """A bound [B] on the rounding of FAISS's float32 scores."""
        lengths, longest = self._queries[block].norm(dim=1), self._gallery.norm(dim=1).max()
        return 1e-5 * ((lengths + longest).square() if self._distance == "euclidean" else lengths * longest)

    def _scores(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        """Scores of queries [B] for all gallery items [B, G], or for those at `positions` [B, K]; own items -inf."""
        queries, gallery = self._queries[block], self._gallery if positions is None else self._gallery[positions]
        if positions is not None:
            queries = queries.unsqueeze(1)
        rounded = _negative_squared_distances if self._distance == "euclidean" else _inner_products
        scores = rounded(queries, gallery)
        return (scores if positions is None else scores[:, 0]).masked_fill(self._is_own(block, positions), -torch.inf)

    def _is_own(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._ids[block, None] == (self._gallery_ids if positions is None else self._gallery_ids[positions])

    def _is_relevant(self, block: Tensor, positions: Tensor | None = None) -> Tensor:
        labels = self._gallery_labels if positions is None else self._gallery_labels[positions]
        return (self._labels[block, None] == labels) & ~self._is_own(block, positions)


# Scores are computed in float64, which has 53 binary digits, and rounded to 34 of them: what differs by the order of additions
# alone becomes equal. Integers are not changed.


def _inner_products(queries: Tensor, gallery: Tensor) -> Tensor:
    """`queries @ gallery.mT`, on a grid of 2^-34 |q| |g| (to the power of two below)."""
    lengths = _power_below(queries.norm(dim=-1)).unsqueeze(-1) * _power_below(gallery.norm(dim=-1)).unsqueeze(-2)
    step = lengths * 2.0**-34
    return (queries @ gallery.mT / step).round() * step


def _negative_squared_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """`-|q - g|^2`, from the differences themselves, to 34 significant digits (Veltkamp's splitting)."""
    squared = torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist").square()
    shifted = squared * (2.0**19 + 1)
    return -(shifted - (shifted - squared))


def _power_below(lengths: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(lengths.clamp_min(2.0**-500))))


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
    """The measures [Q] that need every rank, or as many as there are relevant items."""
    names = ("average_precision", "reciprocal_rank", "r_precision", "average_precision_at_r")
    measures = {
        name: torch.zeros(len(ranking), dtype=torch.float64, device=ranking.num_relevant.device) for name in names
    }
    ranks = torch.arange(1, ranking.num_gallery + 1, device=ranking.num_relevant.device)
    for block, scores, is_relevant in ranking.full():
        num_relevant = ranking.num_relevant[block].clamp_min(1)
        scores, is_relevant = _by_rank(scores, is_relevant)
        hits = is_relevant.cumsum(1)
        group_end = _end_of_equals(scores)
        hits_at_least = hits.gather(1, group_end)  # relevant with a score at least as high
        precision = hits_at_least / (group_end + 1).double()
        measures["average_precision"][block] = precision.masked_fill(~is_relevant, 0).sum(1) / num_relevant
        within_r = is_relevant & (ranks <= num_relevant[:, None])
        measures["r_precision"][block] = within_r.sum(1) / num_relevant.double()
        measures["average_precision_at_r"][block] = (hits / ranks.double() * within_r).sum(1) / num_relevant
        measures["reciprocal_rank"][block] = 1 / (1 + is_relevant.int().argmax(1).double())
    return measures


def _nearest_measures(ranking: _Ranking, recall_at: tuple[int, ...]) -> dict[str, Tensor]:
    """The measures [Q] of the few nearest neighbours."""
    nearest = ranking.relevance_of_nearest(max(*recall_at, 1))
    recall = {f"recall_at_{k}": nearest[:, :k].any(1).double() for k in recall_at}
    return {"precision_at_1": nearest[:, 0].double()} | recall


def _by_rank(scores: Tensor, is_relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and relevance [B, K] in the order of falling scores, irrelevant items first among equals."""
    order = is_relevant.int().argsort(dim=1, stable=True)
    scores, is_relevant = scores.gather(1, order), is_relevant.gather(1, order)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, is_relevant.gather(1, order)


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
    rows = _tensor(values, name)
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_complex():
        raise UserError(f"{name} must be real numbers of shape [N, D], got {rows.dtype} of shape {list(rows.shape)}")
    return rows


def _integers(values: ArrayLike | Tensor | None, name: str) -> Tensor:
    numbers = _tensor(values, name)
    if numbers.ndim != 1 or (len(numbers) and numbers.is_floating_point()) or numbers.is_complex():
        raise UserError(f"{name} must be integers of shape [N], got {numbers.dtype} of shape {list(numbers.shape)}")
    return numbers.long()


def _tensor(values: ArrayLike | Tensor | None, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be an array of numbers: {error}") from None


def _refuse_bad_sizes(queries: _Items, gallery: _Items, recall_at: Sequence[int]) -> None:
    num_queries, num_gallery = len(queries.rows), len(gallery.rows)
    if num_queries == 0 or num_gallery == 0:
        raise UserError(
            f"there must be queries and a gallery, got {num_queries} queries and {num_gallery} gallery items"
        )
    if queries.rows.shape[1] != gallery.rows.shape[1]:
        sizes = f"queries have {queries.rows.shape[1]} dimensions and the gallery {gallery.rows.shape[1]}"
        raise UserError(f"{sizes}; embed both with one model")
    for items in (queries, gallery):
        for kind, numbers in (("labels", items.labels), ("ids", items.ids)):
            if len(items.rows) != len(numbers):
                raise UserError(
                    f"there are {len(items.rows)} {items.name} embeddings but {len(numbers)} {items.name}_{kind}"
                )
    if not recall_at or not all(isinstance(k, int | np.integer) and k >= 1 for k in recall_at):
        raise UserError(f"recall_at must hold whole numbers >= 1, got {recall_at}")
