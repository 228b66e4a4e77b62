"""Retrieval scores: exact over the full ranking, by blocks of queries.

Q queries, G gallery items, B queries of a block, R relevant items of a query at most, K a cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings, as_integers
from mas_embed.retrieval.ranking import PositionLists, Ranking, Ranks
from mas_embed.retrieval.similarity import Distance, prepare_rows

MEBIBYTE = 2**20

METRICS = (  # beside those that are cut at a K
    "mean_average_precision",
    "mean_average_precision_at_r",
    "r_precision",
    "mean_reciprocal_rank",
    "precision_at_1",
)

_MEANS = {
    "average_precision": "mean_average_precision",
    "average_precision_at_r": "mean_average_precision_at_r",
    "reciprocal_rank": "mean_reciprocal_rank",
}


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
        means: every mean by name, those above and what else was asked for: "precision_at_<K>", "ndcg_at_<K>",
            "average_precision_at_<K>_over_relevant" and so on.
        per_query: the values behind the means by name ("average_precision", "average_precision_at_r", "r_precision",
            "reciprocal_rank", "precision_at_1", "recall_at_<K>", ...), each [Q], NaN for a query without a relevant item.
        num_queries: Q, those without a relevant item included.
        num_skipped: queries without a relevant item, left out of every mean.
    """

    mean_average_precision: float
    mean_average_precision_at_r: float
    r_precision: float
    mean_reciprocal_rank: float
    precision_at_1: float
    recall_at: dict[int, float]
    means: dict[str, float] = field(repr=False)
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)
    num_queries: int
    num_skipped: int

    def as_dict(self) -> dict[str, float]:
        """Every mean by name, recall at K as `recall_at_<K>`."""
        return dict(self.means)

    def means_by_group(self, sizes: Sequence[int]) -> list[dict[str, float]]:
        """The means over consecutive groups of queries, by name; NaN for a group without a query that has a relevant item.

        Args:
            sizes: how many queries each group has; they add up to Q.

        Raises:
            UserError: the sizes do not add up to the number of queries.
        """
        if sum(sizes) != self.num_queries:
            raise UserError(f"the groups must hold all {self.num_queries} queries, got {sum(sizes)}")
        ends = np.cumsum(sizes)
        return [
            _means({name: values[end - size : end] for name, values in self.per_query.items()})
            for size, end in zip(sizes, ends, strict=True)
        ]


def evaluate_retrieval(
    queries: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor | None,
    gallery: ArrayLike | Tensor | None = None,
    gallery_labels: ArrayLike | Tensor | None = None,
    *,
    relevant: ArrayLike | Tensor | Sequence[Sequence[int]] | None = None,
    query_ids: ArrayLike | Tensor | None = None,
    gallery_ids: ArrayLike | Tensor | None = None,
    distance: Distance = "cosine",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    precision_at: Sequence[int] = (),
    ndcg_at: Sequence[int] = (),
    average_precision_at: Sequence[int] = (),
    memory_mib: int = 256,
) -> RetrievalScores:
    """Ranks the gallery for every query and scores the rankings; an item is relevant if it has the query's label.

    Average precision of a query with R relevant items is
    `1/R sum_r #(relevant with score >= s_r) / #(all with score >= s_r)`: equal scores are one group, so it does not depend
    on the order of the gallery (scikit-learn's definition). Every other measure gives each item a rank of its own, irrelevant
    items first among equals: no measure gains by ties, and none depends on the order of the gallery. Scores are compared
    in float64, and are equal where they agree to 34 binary digits.

    Average precision cut at K comes with three denominators, each under its own name: of the relevant items at ranks up to K,
    the sum of their precisions over R ("..._over_relevant"), over min(K, R) ("..._over_min"), or over their number
    ("..._over_found"; 0 if there is none). NDCG at K has gains of 0 and 1 and a discount of `1 / log2(1 + rank)`.

    Args:
        queries: [Q, D], finite.
        query_labels: [Q] integers; None where `relevant` tells what is relevant.
        gallery: [G, D]. None: the queries are the gallery, and each query's own item is left out.
        gallery_labels: [G] integers; given exactly when the gallery is, unless `relevant` is.
        relevant: instead of labels, a boolean [Q, G], or for each query the relevant items: their `gallery_ids` where those
            are given, else their positions.
        query_ids: [Q] integers that tell which item a query is; with `gallery_ids`, gallery items with the query's id
            are left out.
        gallery_ids: [G] integers, each once where `relevant` refers to them.
        distance: "cosine", "euclidean" or "inner_product" (higher is nearer).
        recall_at: the K of recall at K, each >= 1; a K beyond the gallery takes all of it.
        precision_at: the K of precision at K, relevant among the K nearest over K.
        ndcg_at: the K of normalised discounted cumulative gain.
        average_precision_at: the K of the truncated average precisions.
        memory_mib: what a block of queries may take, about, beside one float32 copy of the embeddings.

    Returns:
        Means in [0, 1] and per-query values. Queries without a relevant item are left out of the means and counted.

    Raises:
        UserError: shapes that do not fit, labels that are not integers, embeddings that are not finite (or zero under
            "cosine"), an empty gallery, or no query with a relevant item.

    O(Q G D) for few relevant items, on a CPU; else O(Q G (D + log G)).

    Example:
        >>> scores = evaluate_retrieval([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.2]], [0, 0, 1, 1])
        >>> round(scores.mean_average_precision, 3), scores.precision_at_1
        (0.833, 0.75)
    """
    _check_given_together(query_labels, gallery, gallery_labels, relevant, query_ids, gallery_ids)
    asked = _items("query", queries, query_labels, query_ids)
    searched = asked if gallery is None else _items("gallery", gallery, gallery_labels, gallery_ids)
    _check_same_size(asked, searched)
    cuts = _cuts(
        recall_at=recall_at, precision_at=precision_at, ndcg_at=ndcg_at, average_precision_at=average_precision_at
    )
    if not cuts["recall_at"]:
        raise UserError("recall_at must hold whole numbers >= 1, got none")
    if memory_mib < 1:
        raise UserError(f"memory_mib must be at least 1, got {memory_mib}")
    has_own = gallery is None or query_ids is not None
    ranking = Ranking(
        *prepare_rows(asked.rows, searched.rows, distance),
        distance,
        relevant=_relevant(relevant, asked, searched, by_id=gallery_ids is not None),
        own=PositionLists.of_equal_keys(asked.ids, searched.ids if has_own else searched.ids[:0]),
        memory=memory_mib * MEBIBYTE,
    )
    return _summarise(ranking, len(asked.rows), cuts)


class _Items(NamedTuple):
    """Queries or a gallery: embeddings [N, D], labels [N] (None if `relevant` is given) and ids [N], on one device."""

    name: str
    rows: Tensor
    labels: Tensor | None
    ids: Tensor


def _items(
    name: str, rows: ArrayLike | Tensor, labels: ArrayLike | Tensor | None, ids: ArrayLike | Tensor | None
) -> _Items:
    """What was given as tensors; without ids every item is its position."""
    embeddings = as_embeddings(rows, "queries" if name == "query" else name)
    count = len(embeddings)
    numbers = torch.arange(count) if ids is None else as_integers(ids, f"{name}_ids", count)
    kinds = None if labels is None else as_integers(labels, f"{name}_labels", count).to(embeddings.device)
    return _Items(name, embeddings, kinds, numbers.to(embeddings.device))


def _relevant(given: Any, queries: _Items, gallery: _Items, *, by_id: bool) -> PositionLists:
    """The relevant gallery items of every query, the query itself still among them."""
    if given is None:
        assert queries.labels is not None
        assert gallery.labels is not None
        return PositionLists.of_equal_keys(queries.labels, gallery.labels)
    num_queries, num_gallery = len(queries.rows), len(gallery.rows)
    if len(given) != num_queries:
        raise UserError(f"relevant is for {len(given)} queries, but there are {num_queries}")
    given = given if isinstance(given, Tensor | np.ndarray) else [np.asarray(row) for row in given]
    if all(row.dtype in (torch.bool, np.bool_) for row in given):
        table = torch.stack([torch.as_tensor(row) for row in given]).to(queries.rows.device)
        if table.shape != (num_queries, num_gallery):
            raise UserError(f"a boolean relevant must have shape {[num_queries, num_gallery]}, got {list(table.shape)}")
        sizes, positions = table.sum(1), table.nonzero()[:, 1]
    else:
        if all(len(row) == num_gallery > 1 and not (row > 1).any() for row in given):
            raise UserError(
                "relevant holds a 0 or 1 for every gallery item: give it as booleans, or the relevant items' numbers"
            )
        lists = [as_integers(row, "relevant items", len(row)).unique() for row in given]
        sizes, items = torch.tensor([len(row) for row in lists]), torch.cat(lists)
        positions = _positions_of(items, gallery.ids if by_id else torch.arange(num_gallery)).to(queries.rows.device)
        sizes = sizes.to(queries.rows.device)
    ends = sizes.cumsum(0)
    return PositionLists(positions, ends - sizes, ends)


def _positions_of(items: Tensor, ids: Tensor) -> Tensor:
    """Where each item stands among the ids."""
    in_order, positions = ids.cpu().sort()
    if bool((in_order[1:] == in_order[:-1]).any()):
        raise UserError("gallery_ids must all differ where relevant refers to them")
    places = torch.searchsorted(in_order, items).clamp_max(len(in_order) - 1)
    unknown = items[in_order[places] != items]
    if len(unknown):
        raise UserError(f"relevant names the gallery item {int(unknown[0])}, which there is not")
    return positions[places]


def _cuts(**given: Sequence[int]) -> dict[str, tuple[int, ...]]:
    cuts = {}
    for name, values in given.items():
        numbers = tuple(values) if isinstance(values, Iterable) else (values,)
        if not all(isinstance(k, int | np.integer) and k >= 1 for k in numbers):
            raise UserError(f"{name} must hold whole numbers >= 1, got {values}")
        cuts[name] = tuple(map(int, numbers))
    return cuts


def _summarise(ranking: Ranking, num_queries: int, cuts: Mapping[str, tuple[int, ...]]) -> RetrievalScores:
    per_query: dict[str, NDArray[np.float64]] = {}
    for ranks in ranking.blocks():
        for name, values in _measures(ranks, cuts).items():
            own = per_query.setdefault(name, np.full(num_queries, np.nan))
            own[ranks.queries.cpu().numpy()] = values.cpu().numpy()
    if not per_query:
        raise UserError("no query has a relevant item in the gallery: no gallery item, itself aside, is relevant to it")
    means = _means(per_query)
    return RetrievalScores(
        mean_average_precision=means["mean_average_precision"],
        mean_average_precision_at_r=means["mean_average_precision_at_r"],
        r_precision=means["r_precision"],
        mean_reciprocal_rank=means["mean_reciprocal_rank"],
        precision_at_1=means["precision_at_1"],
        recall_at={k: means[f"recall_at_{k}"] for k in cuts["recall_at"]},
        means=means,
        per_query=per_query,
        num_queries=num_queries,
        num_skipped=int(np.isnan(per_query["average_precision"]).sum()),
    )


def _means(per_query: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The means over the queries with a relevant item, by the names of means; NaN where there is none."""
    return {
        _MEANS.get(name, name): float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
        for name, values in per_query.items()
    }


def _measures(ranks: Ranks, cuts: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every measure [B] of queries with R relevant items each, from these items' ranks."""
    is_item, num_relevant = ranks.is_item, ranks.is_item.sum(1).double()
    place = torch.arange(1, is_item.shape[1] + 1, device=is_item.device).double()
    rank = (ranks.num_ahead + place).masked_fill(~is_item, torch.inf)
    hits_at_least = _last_of_equals(ranks.scores).double() + 1
    precision = (hits_at_least / (ranks.num_ahead + hits_at_least)).masked_fill(~is_item, 0)
    precision_at_rank = place / rank

    def found(cut: Tensor | int) -> Tensor:
        return rank <= (cut if isinstance(cut, int) else cut.unsqueeze(1))

    within_r = found(num_relevant)
    measures = {
        "average_precision": precision.sum(1) / num_relevant,
        "average_precision_at_r": (precision_at_rank * within_r).sum(1) / num_relevant,
        "r_precision": within_r.sum(1) / num_relevant,
        "reciprocal_rank": 1 / rank[:, 0],
        "precision_at_1": found(1)[:, 0].double(),
    }
    measures |= {f"recall_at_{k}": found(k).any(1).double() for k in cuts["recall_at"]}
    measures |= {f"precision_at_{k}": found(k).sum(1).double() / k for k in cuts["precision_at"]}
    for k in cuts["ndcg_at"]:
        ideal = (1 / torch.log2(1 + place[:k])).cumsum(0)[num_relevant.long().clamp_max(k) - 1]
        measures[f"ndcg_at_{k}"] = (found(k) / torch.log2(1 + rank)).sum(1) / ideal
    for k in cuts["average_precision_at"]:
        total, num_found = (precision_at_rank * found(k)).sum(1), found(k).sum(1)
        denominators = {"relevant": num_relevant, "min": num_relevant.clamp_max(k), "found": num_found.clamp_min(1)}
        for denominator, count in denominators.items():
            measures[f"average_precision_at_{k}_over_{denominator}"] = total / count
    return measures


def _last_of_equals(sorted_scores: Tensor) -> Tensor:
    """For every position [B, R] the last position that has the same score."""
    size = sorted_scores.shape[1]
    positions = torch.arange(size, device=sorted_scores.device).expand_as(sorted_scores)
    is_last = torch.ones_like(sorted_scores, dtype=torch.bool)
    is_last[:, :-1] = sorted_scores[:, :-1] != sorted_scores[:, 1:]
    return positions.masked_fill(~is_last, size).flip(1).cummin(1).values.flip(1)


def _check_given_together(
    query_labels: Any, gallery: Any, gallery_labels: Any, relevant: Any, query_ids: Any, gallery_ids: Any
) -> None:
    if relevant is not None and (query_labels is not None or gallery_labels is not None):
        raise UserError("relevant takes the place of the labels: give query_labels=None and no gallery_labels")
    if relevant is None and query_labels is None:
        raise UserError("query_labels is None: give the labels of the queries, or relevant")
    if relevant is None and (gallery is None) != (gallery_labels is None):
        raise UserError(
            "gallery and gallery_labels go together: give both, or neither to rank the queries among themselves"
        )
    if query_ids is not None and (gallery is None or gallery_ids is None):
        raise UserError("query_ids and gallery_ids go together, beside a gallery")
    if gallery_ids is not None and query_ids is None and relevant is None:
        raise UserError("query_ids and gallery_ids go together, beside a gallery")


def _check_same_size(queries: _Items, gallery: _Items) -> None:
    if queries.rows.shape[1] != gallery.rows.shape[1]:
        sizes = f"queries have {queries.rows.shape[1]} dimensions and the gallery {gallery.rows.shape[1]}"
        raise UserError(f"{sizes}; embed both with one model")
