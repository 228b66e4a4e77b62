"""Retrieval metrics over the full ranking of the gallery, exact and computed in blocks of queries.

Q queries, G gallery items, B queries in a block, R the largest number of relevant items of a query in the block, K a cutoff
(a metric at K considers the K nearest items), N embeddings of either kind, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.items import Items, as_items, check_arguments, relevant_lists
from mas_embed.retrieval.ranking import PositionLists, Ranking, Ranks
from mas_embed.retrieval.similarity import Distance, Transform, lazy_rows
from mas_embed.runtime.checks import as_whole_number, check_at_least, shown
from mas_embed.runtime.distributed import together
from mas_embed.runtime.progress import progress_bar

MEBIBYTE = 2**20
CPU_MEMORY_MIB = 256
GPU_MEMORY_MIB = 2048  # large blocks, so that a GPU is not waiting for the next one

RECALL_AT = (1, 2, 4, 8)

METRICS = (  # that every evaluation computes, beside recall at the requested cutoffs
    "mean_average_precision",
    "mean_average_precision_at_r",
    "r_precision",
    "mean_reciprocal_rank",
    "precision_at_1",
)

_NAMES_OF_MEANS = {  # only where the mean is called differently
    "average_precision": "mean_average_precision",
    "average_precision_at_r": "mean_average_precision_at_r",
    "reciprocal_rank": "mean_reciprocal_rank",
}


@dataclass(frozen=True)
class RetrievalScores:
    """Metrics as means over the queries that have a relevant item, and the values of every query.

    Attributes:
        mean_average_precision: the mean average precision over the full ranking; items with equal scores form one group.
        mean_average_precision_at_r: the mean over queries of the precisions at the relevant items among the R nearest, summed
            and divided by R, where R is the query's number of relevant items.
        r_precision: the mean share of relevant items among the R nearest.
        mean_reciprocal_rank: the mean of 1 / rank of the first relevant item.
        precision_at_1: the share of queries whose nearest item is relevant.
        recall_at: by K, the share of queries with a relevant item among the K nearest.
        means: every mean by name: those above, and those at the requested cutoffs, such as "precision_at_<K>",
            "ndcg_at_<K>" and "average_precision_at_<K>_over_relevant".
        per_query: the values [Q] that are averaged, by name ("average_precision", "average_precision_at_r", "r_precision",
            "reciprocal_rank", "precision_at_1", "recall_at_<K>", ...); NaN for a query without a relevant item.
        num_queries: Q, including queries without a relevant item.
        num_skipped: the number of queries without a relevant item, which do not count in any mean.
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
        """A copy of `means`: every mean by name, with recall at K as `recall_at_<K>`."""
        return dict(self.means)

    def means_by_group(self, sizes: Sequence[int]) -> list[dict[str, float]]:
        """The means over each of several consecutive groups of queries, by name, as in `means`.

        Args:
            sizes: the number of queries in each group; the sum is Q.

        Returns:
            One dictionary for each group. Its values are NaN if no query of the group has a relevant item.

        Raises:
            UserError: a size is negative, or they do not add up to Q.
        """
        sizes = [as_whole_number("the size of a group", size) for size in _as_tuple(sizes)]
        if sum(sizes) != self.num_queries or min(sizes, default=0) < 0:
            raise UserError(f"the sizes of the groups must be >= 0 and add up to {self.num_queries}, got {list(sizes)}")
        ends = np.cumsum(sizes)
        return [
            _means({name: values[end - size : end] for name, values in self.per_query.items()})
            for size, end in zip(sizes, ends, strict=True)
        ]

    def means_of(self, is_selected: NDArray[np.bool_] | Tensor) -> dict[str, float]:
        """The means over the selected queries, by name, as in `means`; NaN if none of them has a relevant item.

        Args:
            is_selected: [Q] booleans.
        """
        mask = np.asarray(is_selected, dtype=bool)
        return _means({name: values[mask] for name, values in self.per_query.items()})


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
    recall_at: Sequence[int] = RECALL_AT,
    precision_at: Sequence[int] = (),
    ndcg_at: Sequence[int] = (),
    average_precision_at: Sequence[int] = (),
    memory_mib: int | None = None,
    progress: bool = False,
    is_sharded: bool = False,
) -> RetrievalScores:
    """Retrieval metrics of the queries on the gallery; an item is relevant to a query if both have the same label.

    The average precision of a query with R relevant items is
    `1/R sum_r #(relevant with score >= s_r) / #(all with score >= s_r)`. Items with equal scores form one group (scikit-learn's
    definition). Every other metric gives each item a distinct rank, in which irrelevant items precede relevant ones of equal
    score. Ties therefore never improve a metric, and no metric depends on the order of the gallery. Scores are compared in
    float64; they count as equal if they agree to 34 binary digits.

    Average precision at K sums the precisions at the relevant items of rank <= K. It is reported with three denominators:
    R ("..._over_relevant"), min(K, R) ("..._over_min"), and the number of relevant items of rank <= K ("..._over_found"; the
    metric is 0 if there are none). NDCG at K uses gains of 0 and 1 and a discount of `1 / log2(1 + rank)`.

    The gallery is read in chunks. Arrays may be larger than memory: those that `np.load(..., mmap_mode="r")` maps from a file are
    never read as a whole.

    Args:
        queries: [Q, D], finite.
        query_labels: [Q] integers; None if `relevant` is given.
        gallery: [G, D], finite. None: the queries are also the gallery, and a query does not retrieve itself.
        gallery_labels: [G] integers; required if the gallery is given and `relevant` is not.
        relevant: a replacement for the labels: a boolean matrix [Q, G], or one list of relevant items per query. The lists
            contain `gallery_ids` if those are given, else gallery positions.
        query_ids: [Q] integers that identify the item of each query. Given together with `gallery_ids`; a query then does
            not retrieve gallery items with its id.
        gallery_ids: [G] integers that identify the gallery items; distinct if `relevant` lists them.
        distance: "cosine", "euclidean" or "inner_product".
        recall_at: the cutoffs K >= 1 of recall at K. A K above G stands for the whole gallery.
        precision_at: the cutoffs of precision at K, the number of relevant items among the K nearest, divided by K.
        ndcg_at: the cutoffs of normalised discounted cumulative gain.
        average_precision_at: the cutoffs of average precision at K.
        memory_mib: the approximate memory in MiB for a block of queries, and for a chunk of the gallery. None: 256 on a CPU and
            2048 on a GPU.
        progress: whether to show a progress bar.
        is_sharded: whether every process of a `torch.distributed` group calls this function with the same queries and with its
            own part of the gallery, at least one item, so that none holds all of it. All get the scores in the whole gallery.

    Returns:
        Means in [0, 1] and the values per query. Queries without a relevant item are left out of the means and counted in
        `num_skipped`.

    Raises:
        UserError: shapes do not match, labels are not integers, an embedding is not finite (or is zero under "cosine"), the
            gallery is empty, or no query has a relevant item.

    Takes O(Q G D) if queries have few relevant items, otherwise O(Q G (D + log G)).

    Examples:
        >>> scores = evaluate_retrieval([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.2]], [0, 0, 1, 1])
        >>> round(scores.mean_average_precision, 3), scores.precision_at_1
        (0.833, 0.75)
    """
    check_arguments(query_labels, gallery, gallery_labels, relevant, query_ids, gallery_ids)
    if is_sharded and (gallery is None or relevant is not None):
        raise UserError(
            "is_sharded needs a gallery and labels: pass each process's part of the gallery, and no `relevant`"
        )
    query_items = as_items("query", queries, query_labels, query_ids)
    gallery_items = query_items if gallery is None else as_items("gallery", gallery, gallery_labels, gallery_ids)
    cutoffs = _as_cutoffs(
        recall_at=recall_at, precision_at=precision_at, ndcg_at=ndcg_at, average_precision_at=average_precision_at
    )
    if not cutoffs["recall_at"]:
        raise UserError("recall_at must hold whole numbers >= 1, got none")
    return (together(_evaluate) if is_sharded else _evaluate)(
        query_items,
        gallery_items,
        relevant_lists(relevant, query_items, gallery_items, by_id=gallery_ids is not None),
        excludes_queries=gallery is None or query_ids is not None,
        distance=distance,
        cutoffs=cutoffs,
        memory_mib=memory_mib,
        description="ranking" if progress else None,
        is_sharded=is_sharded,
    )


def evaluate_transformed_gallery(
    queries: Tensor,
    query_labels: ArrayLike | Tensor,
    gallery: Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    transform: Transform | None,
    query_ids: ArrayLike | Tensor | None,
    gallery_ids: ArrayLike | Tensor | None,
    distance: Distance,
    description: str | None,
) -> RetrievalScores:
    """`evaluate_retrieval` with its default cutoffs on a gallery that is transformed when it is read, some rows at a time.

    Args:
        queries: as the others, see `evaluate_retrieval`.
        query_labels: of the queries.
        gallery: before it is transformed.
        gallery_labels: of the gallery.
        transform: of some rows [N, D]; None for nothing.
        query_ids: of the queries.
        gallery_ids: of the gallery.
        distance: by which items are ranked.
        description: of the progress bar; None for no bar.
    """
    check_arguments(query_labels, gallery, gallery_labels, None, query_ids, gallery_ids)
    query_items = as_items("query", queries, query_labels, query_ids)
    gallery_items = as_items("gallery", gallery, gallery_labels, gallery_ids)
    return _evaluate(
        query_items,
        gallery_items,
        relevant_lists(None, query_items, gallery_items, by_id=False),
        excludes_queries=query_ids is not None,
        distance=distance,
        cutoffs=_as_cutoffs(recall_at=RECALL_AT, precision_at=(), ndcg_at=(), average_precision_at=()),
        transform=transform,
        description=description,
    )


def _evaluate(
    queries: Items,
    gallery: Items,
    relevant: PositionLists,
    *,
    excludes_queries: bool,
    distance: Distance,
    cutoffs: Mapping[str, tuple[int, ...]],
    memory_mib: int | None = None,
    transform: Transform | None = None,
    description: str | None,
    is_sharded: bool = False,
) -> RetrievalScores:
    """The scores of arguments that are checked."""
    if memory_mib is None:
        memory_mib = GPU_MEMORY_MIB if queries.rows.is_cuda else CPU_MEMORY_MIB
    memory_mib = as_whole_number("memory_mib", memory_mib, maximum=2**30)
    check_at_least("memory_mib", memory_mib, 1)
    rows = lazy_rows(queries.rows, gallery.rows, distance, transform, is_sharded=is_sharded)
    excluded = PositionLists.of_equal_keys(queries.ids, gallery.ids if excludes_queries else gallery.ids[:0])
    with progress_bar(description, total=len(queries.rows) * len(gallery.rows)) as advance:
        ranking = Ranking(
            *rows,
            distance,
            relevant=relevant,
            excluded=excluded,
            memory=memory_mib * MEBIBYTE,
            advance=advance,
            is_sharded=is_sharded,
        )
        return _scores_of(ranking, len(queries.rows), cutoffs)


def _as_cutoffs(**arguments: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The cutoffs K by the name of the argument; raises `UserError` if one is not an integer >= 1."""
    cutoffs = {}
    for name, values in arguments.items():
        numbers = _as_tuple(values)
        if not all(isinstance(k, int | np.integer) and not isinstance(k, bool) and 1 <= k < 2**63 for k in numbers):
            raise UserError(f"{name} must hold whole numbers >= 1, got {shown(values)}")
        cutoffs[name] = tuple(map(int, numbers))
    return cutoffs


def _as_tuple(values: Any) -> tuple[Any, ...]:
    """The values, of which there may be a single one."""
    try:
        return tuple(values)
    except TypeError:  # not iterable, or an array without dimensions
        return (values,)


def _scores_of(ranking: Ranking, num_queries: int, cutoffs: Mapping[str, tuple[int, ...]]) -> RetrievalScores:
    """The metrics of all queries and their means; raises `UserError` if no query has a relevant item."""
    per_query: dict[str, NDArray[np.float64]] = {}
    for ranks in ranking.blocks():
        for name, values in _metrics(ranks, cutoffs).items():
            values_of_all = per_query.setdefault(name, np.full(num_queries, np.nan))
            values_of_all[ranks.queries.cpu().numpy()] = values.cpu().numpy()
    if not per_query:
        raise UserError("no query has a relevant item in the gallery, not counting the query itself")
    means = _means(per_query)
    return RetrievalScores(
        mean_average_precision=means["mean_average_precision"],
        mean_average_precision_at_r=means["mean_average_precision_at_r"],
        r_precision=means["r_precision"],
        mean_reciprocal_rank=means["mean_reciprocal_rank"],
        precision_at_1=means["precision_at_1"],
        recall_at={k: means[f"recall_at_{k}"] for k in cutoffs["recall_at"]},
        means=means,
        per_query=per_query,
        num_queries=num_queries,
        num_skipped=int(np.isnan(per_query["average_precision"]).sum()),
    )


def _means(per_query: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The means over the queries with a relevant item, by the names of the means; NaN if there is no such query."""
    return {
        _NAMES_OF_MEANS.get(name, name): float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
        for name, values in per_query.items()
    }


def _metrics(ranks: Ranks, cutoffs: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The values [B] of every metric, by name, from the ranks of the relevant items."""
    is_valid, num_relevant = ranks.is_valid, ranks.is_valid.sum(1).double()
    # The number of relevant items up to and including each one
    num_so_far = torch.arange(1, is_valid.shape[1] + 1, device=is_valid.device).double()
    rank = (ranks.num_ahead + num_so_far).masked_fill(~is_valid, torch.inf)
    precision_at_rank = num_so_far / rank
    # The number of relevant items that score at least as high
    num_at_least = _last_equal_position(ranks.scores).double() + 1
    tied_precision = (num_at_least / (ranks.num_ahead + num_at_least)).masked_fill(~is_valid, 0)

    def is_within(cutoff: Tensor | int) -> Tensor:
        return rank <= (cutoff if isinstance(cutoff, int) else cutoff.unsqueeze(1))

    within_r = is_within(num_relevant)
    metrics = {
        "average_precision": tied_precision.sum(1) / num_relevant,
        "average_precision_at_r": (precision_at_rank * within_r).sum(1) / num_relevant,
        "r_precision": within_r.sum(1) / num_relevant,
        "reciprocal_rank": 1 / rank[:, 0],
        "precision_at_1": is_within(1)[:, 0].double(),
    }
    metrics |= {f"recall_at_{k}": is_within(k).any(1).double() for k in cutoffs["recall_at"]}
    metrics |= {f"precision_at_{k}": is_within(k).sum(1).double() / k for k in cutoffs["precision_at"]}
    for k in cutoffs["ndcg_at"]:
        ideal = (1 / torch.log2(1 + num_so_far[:k])).cumsum(0)[num_relevant.long().clamp_max(k) - 1]
        metrics[f"ndcg_at_{k}"] = (is_within(k) / torch.log2(1 + rank)).sum(1) / ideal
    for k in cutoffs["average_precision_at"]:
        total, num_found = (precision_at_rank * is_within(k)).sum(1), is_within(k).sum(1)
        denominators = {"relevant": num_relevant, "min": num_relevant.clamp_max(k), "found": num_found.clamp_min(1)}
        for denominator, count in denominators.items():
            metrics[f"average_precision_at_{k}_over_{denominator}"] = total / count
    return metrics


def _last_equal_position(sorted_scores: Tensor) -> Tensor:
    """The last position in the row that has the same score, for every position [B, R]."""
    size = sorted_scores.shape[1]
    positions = torch.arange(size, device=sorted_scores.device).expand_as(sorted_scores)
    is_last = torch.ones_like(sorted_scores, dtype=torch.bool)
    is_last[:, :-1] = sorted_scores[:, :-1] != sorted_scores[:, 1:]
    return positions.masked_fill(~is_last, size).flip(1).cummin(1).values.flip(1)
