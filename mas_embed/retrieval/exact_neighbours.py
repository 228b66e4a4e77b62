"""The nearest gallery items of a few queries, with their similarities, by scoring every pair in float64.

Q queries, G gallery items, K neighbours, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.retrieval.inputs import unit_rows
from mas_embed.retrieval.similarity import Distance, check_distance

PAIRS_AT_ONCE = 2**22  # of a query and an item, so that memory is bounded


class NearestItems(NamedTuple):
    """The gallery items that are nearest to every query, nearest first.

    Attributes:
        positions: [Q, K] int64; -1 where fewer than K items are left for a query.
        similarities: [Q, K] float64: the cosine, the negative squared distance under "euclidean", or the inner product; NaN where
            there is no item.
    """

    positions: Tensor
    similarities: Tensor


def nearest_items(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    distance: Distance = "cosine",
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
) -> NearestItems:
    """The k nearest items of every query, in O(Q G D) time; `find_nearest` is faster for many queries.

    Of items with equal similarities, the one that comes first in the gallery is nearer; which of them come first if they tie for
    the k-th place is not specified.

    Args:
        queries: [Q, D], finite.
        gallery: [G, D], finite.
        k: the number of neighbours, k >= 1.
        distance: "cosine", "euclidean" or "inner_product".
        query_ids: [Q]; a query does not retrieve gallery items with its id. None if no query is a gallery item.
        gallery_ids: [G]; given together with `query_ids`.

    Raises:
        UserError: a row is zero under "cosine", or the distance does not exist.
    """
    check_distance(distance)
    queries = unit_rows(queries, "queries") if distance == "cosine" else queries.double()
    size = max(k, PAIRS_AT_ONCE // max(len(queries), 1))
    scores = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(gallery), size):
        found = _scores(queries, gallery[start : start + size], distance)
        if query_ids is not None and gallery_ids is not None:
            found.masked_fill_(query_ids[:, None] == gallery_ids[start : start + size], -torch.inf)
        best = found.topk(min(k, found.shape[1]), dim=1)
        scores, positions = torch.cat([scores, best.values], 1), torch.cat([positions, best.indices + start], 1)
        scores, positions = _first(scores, positions, k)
    missing = k - scores.shape[1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    positions = torch.nn.functional.pad(positions, (0, missing), value=-1)
    is_missing = scores == -torch.inf
    return NearestItems(positions.masked_fill_(is_missing, -1), scores.masked_fill_(is_missing, torch.nan))


def _scores(queries: Tensor, gallery: Tensor, distance: Distance) -> Tensor:
    """The similarities [Q, G] of queries in float64, of unit length under "cosine", and of gallery items."""
    if distance != "euclidean":
        return queries @ (unit_rows(gallery, "gallery") if distance == "cosine" else gallery.double()).T
    # Centring does not change distances, and reduces their rounding errors
    centre = queries.mean(0)
    queries, gallery = queries - centre, gallery.double() - centre
    squares = queries.square().sum(1, keepdim=True) + gallery.square().sum(1)
    return squares.neg_().addmm_(queries, gallery.T, alpha=2).clamp_max_(0)


def _first(scores: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of every row with their positions; at equal scores, the lower position comes first."""
    by_position = positions.argsort(dim=1)
    scores, positions = scores.gather(1, by_position), positions.gather(1, by_position)
    by_score = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, by_score), positions.gather(1, by_score)
