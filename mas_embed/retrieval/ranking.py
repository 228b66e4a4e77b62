"""Where the relevant items of a query stand among the irrelevant ones: all that any ranking measure needs.

The rank of a relevant item follows from the number of irrelevant items that score at least as high. Those are counted, never
sorted: a query's quick scores fall into bins between its lowest and its highest relevant item, and only items that are
within rounding of a relevant one are scored exactly (`counting`). Where that does not pay (many relevant items, items that
are all alike, a GPU) all scores are computed exactly and sorted. Both give the same numbers.

Q queries, G gallery items, B queries of a block, R relevant items of a query at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.retrieval.counting import Counting
from mas_embed.retrieval.similarity import Distance, PairScores, QuickScores, Rows, exact_scores

NUMBERS_AT_ONCE = 2**19  # of float64
DENSE_SHARE = 1 / 20  # of the gallery that is relevant: from here on sorting is faster than counting


class PositionLists(NamedTuple):
    """For every query a list of gallery positions: `positions[starts[q] : ends[q]]`."""

    positions: Tensor
    starts: Tensor
    ends: Tensor

    def sizes(self) -> Tensor:
        """[Q]."""
        return self.ends - self.starts

    def padded(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """For the queries of a block the positions [B, L], and which of them are meant [B, L]."""
        starts, sizes = self.starts[block], self.sizes()[block]
        places = torch.arange(int(sizes.max()), device=starts.device)
        is_meant = places < sizes.unsqueeze(1)
        return self.positions[(starts.unsqueeze(1) + places).masked_fill(~is_meant, 0)], is_meant

    @classmethod
    def of_equal_keys(cls, keys: Tensor, gallery_keys: Tensor) -> PositionLists:
        """For keys [Q] the gallery items of the same key."""
        in_order, positions = gallery_keys.sort(stable=True)
        return cls(positions, torch.searchsorted(in_order, keys), torch.searchsorted(in_order, keys, right=True))


class Ranks(NamedTuple):
    """The relevant items of a block of queries, nearest first; where `is_item` is False there is none.

    Attributes:
        queries: [B] positions.
        scores: [B, R] float64.
        num_ahead: [B, R] irrelevant items that score at least as high.
        is_item: [B, R].
    """

    queries: Tensor
    scores: Tensor
    num_ahead: Tensor
    is_item: Tensor


class Ranking:
    """The gallery as every query ranks it.

    Args:
        queries: Q rows, prepared together with the gallery.
        gallery: G rows.
        distance: for which they were prepared.
        relevant: of every query.
        own: gallery items that are the query itself, left out.
        memory: bytes that a block of queries may take, about.
    """

    def __init__(
        self,
        queries: Rows,
        gallery: Rows,
        distance: Distance,
        *,
        relevant: PositionLists,
        own: PositionLists,
        memory: int,
    ) -> None:
        self._queries, self._gallery, self._distance = queries, gallery, distance
        self._relevant, self._own, self._memory = relevant, own, memory

    def blocks(self) -> Iterator[Ranks]:
        """Every query that has relevant items, in blocks of queries with about as many."""
        sizes = self._relevant.sizes()
        by_size = sizes.argsort(stable=True)
        by_size = by_size[sizes[by_size] > 0]
        is_counted = sizes[by_size] <= DENSE_SHARE * len(self._gallery)
        if self._queries.values.device.type != "cpu":
            is_counted = torch.zeros_like(is_counted)
        if bool(is_counted.any()):
            yield from self._counted(by_size[is_counted])
        yield from self._sorted(by_size[~is_counted])

    def _sorted(self, queries: Tensor) -> Iterator[Ranks]:
        """By all exact scores: those of the irrelevant items are sorted, those of the relevant ones looked up among them."""
        for block in self._cut(queries, bytes_per_score=48, bytes_per_item=0):
            block, positions, is_item, own, is_own = self._items_of(block)
            if len(block) == 0:
                continue
            scores = self._all_exact(block)
            of_items = scores.gather(1, positions).masked_fill(~is_item, -torch.inf)
            for known, is_meant in ((positions, is_item), (own, is_own)):
                scores[is_meant.nonzero()[:, 0], known[is_meant]] = -torch.inf
            nearest_first, order = of_items.sort(dim=1, descending=True)
            num_ahead = len(self._gallery) - torch.searchsorted(scores.sort(dim=1).values, nearest_first)
            yield Ranks(block, nearest_first, num_ahead, is_item.gather(1, order))

    def _counted(self, queries: Tensor) -> Iterator[Ranks]:
        """By counting; queries for which that does not go, by sorting."""
        quick_scores = QuickScores(self._queries, self._gallery, self._distance)
        pair_scores = PairScores(self._queries, self._gallery, self._distance)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for block in self._cut(queries, bytes_per_score=6, bytes_per_item=16 * self._gallery.values.shape[1]):
                block, positions, is_item, own, is_own = self._items_of(block)
                if len(block) == 0:
                    continue
                exact = self._exact_of(block, positions)
                nearest_first, order = exact.masked_fill(~is_item, -torch.inf).sort(dim=1, descending=True)
                known = torch.cat([positions.masked_fill(~is_item, -1), own.masked_fill(~is_own, -1)], dim=1)
                quick, offset, error = quick_scores(block)
                counted = (quick, offset, error, nearest_first, is_item.sum(1), known, block)
                counting = Counting(*(tensor.numpy() for tensor in counted), pair_scores=pair_scores)
                num_ahead = torch.from_numpy(counting.run(pool))
                # A matrix product of less precision, which a user may allow, would show here
                deviation = (quick.gather(1, positions) - offset[:, None] - exact).abs()
                is_done = (num_ahead[:, 0] >= 0) & ((deviation <= error[:, None]) | ~is_item).all(1)
                ranks = Ranks(block, nearest_first, num_ahead, is_item.gather(1, order))
                yield Ranks(*(part[is_done] for part in ranks))
                yield from self._sorted(block[~is_done])

    def _cut(self, queries: Tensor, *, bytes_per_score: int, bytes_per_item: int) -> Iterator[Tensor]:
        """Queries, in the order of the number of their relevant items, in blocks that keep to the memory."""
        sizes = self._relevant.sizes()
        while len(queries):
            per_query = bytes_per_score * len(self._gallery) + bytes_per_item * sizes[queries]
            places = torch.arange(1, len(queries) + 1, device=queries.device)
            num_queries = max(1, int((places * per_query <= self._memory).sum()))
            yield queries[:num_queries]
            queries = queries[num_queries:]

    def _items_of(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those queries [B] that have relevant items apart from themselves; these [B, R] and their own items [B, L], padded."""
        positions, is_item = self._relevant.padded(block)
        own, is_own = self._own.padded(block)
        for place in range(own.shape[1]):
            is_item &= (positions != own[:, place : place + 1]) | ~is_own[:, place : place + 1]
        has_items = is_item.any(1)
        block, positions, is_item, own, is_own = (
            tensor[has_items] for tensor in (block, positions, is_item, own, is_own)
        )
        return block, positions, is_item, own, is_own

    def _exact_of(self, block: Tensor, positions: Tensor) -> Tensor:
        """Exact scores [B, R] of the items at positions [B, R], a few queries at a time, so that rows stay in the cache."""
        step = max(1, NUMBERS_AT_ONCE // (positions.shape[1] * self._gallery.values.shape[1]))
        parts = zip(block.split(step), positions.split(step), strict=True)
        scores = [exact_scores(self._queries[some, None], self._gallery[of], self._distance) for some, of in parts]
        return torch.cat(scores)[:, 0]

    def _all_exact(self, block: Tensor) -> Tensor:
        """Exact scores [B, G], a part of the gallery at a time, for in float64 it takes room."""
        step = max(1, self._memory // (16 * self._gallery.values.shape[1]))
        parts = [self._gallery[start : start + step] for start in range(0, len(self._gallery), step)]
        return torch.cat([exact_scores(self._queries[block], part, self._distance) for part in parts], dim=1)
