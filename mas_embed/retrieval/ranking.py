"""The ranks of every query's relevant gallery items, from which all retrieval metrics are computed.

The rank of a relevant item follows from the number of irrelevant items that score at least as high. On a CPU that number is
counted without sorting the gallery: items are compared by approximate float32 scores, and only items whose score is within
the rounding error of a relevant item are scored exactly (see `counting`). Where counting is slower (many relevant items, many
nearly equal scores), all scores are computed exactly and sorted. On a GPU, too, all scores are computed exactly; they are
compared with each relevant item's if those are few, and else sorted. All methods give the same ranks.

Q queries, G gallery items, B queries in a block, R the largest number of relevant items of a query in the block,
X the largest number of excluded items, L the largest length of a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.retrieval.counting import Counting
from mas_embed.retrieval.similarity import ApproximateScores, Distance, PairScores, Rows, exact_scores

NUMBERS_AT_ONCE = 2**19  # float64 numbers of gallery rows that are scored at once, so that they stay in the cache
SORTED_BY_ONE_THREAD = 2**18  # numbers: below, a pool of threads costs as much as it saves
COMPARED_AT_MOST = 16  # relevant items of a query; on a GPU, sorting is faster with more (measured)
DENSE_SHARE = 1 / 20  # of the gallery that is relevant: above it, sorting is faster than counting


class PositionLists(NamedTuple):
    """A list of gallery positions for every query; that of query q is `positions[starts[q] : ends[q]]`."""

    positions: Tensor
    starts: Tensor
    ends: Tensor

    def sizes(self) -> Tensor:
        """[Q] the length of each list."""
        return self.ends - self.starts

    def padded(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The lists of the queries in a block as one matrix [B, L], and a mask [B, L] that is False for the padding."""
        starts, sizes = self.starts[block], self.sizes()[block]
        columns = torch.arange(int(sizes.max()), device=starts.device)
        is_valid = columns < sizes.unsqueeze(1)
        return self.positions[(starts.unsqueeze(1) + columns).masked_fill(~is_valid, 0)], is_valid

    @classmethod
    def of_equal_keys(cls, keys: Tensor, gallery_keys: Tensor) -> PositionLists:
        """The gallery items whose key equals that of the query, from keys [Q] and gallery keys [G]."""
        in_order, positions = gallery_keys.sort(stable=True)
        return cls(positions, torch.searchsorted(in_order, keys), torch.searchsorted(in_order, keys, right=True))


class Ranks(NamedTuple):
    """The relevant items of a block of queries, in the order of their scores, padded to R items each.

    Attributes:
        queries: [B] positions of the queries.
        scores: [B, R] float64 scores of the relevant items, highest first.
        num_ahead: [B, R] the number of irrelevant items that score at least as high.
        is_valid: [B, R] False for the padding.
    """

    queries: Tensor
    scores: Tensor
    num_ahead: Tensor
    is_valid: Tensor


class _BlockItems(NamedTuple):
    """The relevant and the excluded gallery items of a block of queries, padded to R and X items each.

    Attributes:
        queries: [B] positions of the queries.
        relevant: [B, R] gallery positions.
        is_relevant: [B, R] False for the padding and for relevant items that are excluded.
        excluded: [B, X] gallery positions.
        is_excluded: [B, X] False for the padding.
    """

    queries: Tensor
    relevant: Tensor
    is_relevant: Tensor
    excluded: Tensor
    is_excluded: Tensor


class Ranking:
    """Ranks the gallery for every query.

    Args:
        queries: Q rows, prepared together with the gallery by `prepare_rows`.
        gallery: G rows.
        distance: the distance that the rows were prepared for.
        relevant: the relevant gallery items of every query.
        excluded: the gallery items that are left out of the ranking of a query, because they are the query itself.
        memory: approximate memory in bytes that a block of queries may take.
    """

    def __init__(
        self,
        queries: Rows,
        gallery: Rows,
        distance: Distance,
        *,
        relevant: PositionLists,
        excluded: PositionLists,
        memory: int,
    ) -> None:
        self._queries, self._gallery, self._distance = queries, gallery, distance
        self._relevant, self._excluded, self._memory = relevant, excluded, memory

    def blocks(self) -> Iterator[Ranks]:
        """The ranks of every query that has a relevant item, in blocks of queries with similarly many relevant items."""
        sizes = self._relevant.sizes()
        by_size = sizes.argsort(stable=True)
        by_size = by_size[sizes[by_size] > 0]
        is_counted = sizes[by_size] <= DENSE_SHARE * len(self._gallery)
        if self._queries.values.device.type != "cpu":
            is_counted = torch.zeros_like(is_counted)
        if bool(is_counted.any()):
            yield from self._by_counting(by_size[is_counted])
        yield from self._by_sorting(by_size[~is_counted])

    def _by_sorting(self, queries: Tensor) -> Iterator[Ranks]:
        """The ranks from exact scores of all items: see `_num_at_least`."""
        for block in self._memory_blocks(queries, bytes_per_score=48, bytes_per_item=0):
            items = self._items_of(block)
            if len(items.queries) == 0:
                continue
            scores = self._exact_scores_of_all(items.queries)
            relevant_scores = scores.gather(1, items.relevant).masked_fill(~items.is_relevant, -torch.inf)
            for positions, is_valid in ((items.relevant, items.is_relevant), (items.excluded, items.is_excluded)):
                scores[is_valid.nonzero()[:, 0], positions[is_valid]] = -torch.inf
            highest_first, order = relevant_scores.sort(dim=1, descending=True)
            num_ahead = _num_at_least(highest_first, scores)
            yield Ranks(items.queries, highest_first, num_ahead, items.is_relevant.gather(1, order))

    def _by_counting(self, queries: Tensor) -> Iterator[Ranks]:
        """The ranks by counting, or by sorting for queries whose approximate scores leave too much in doubt."""
        approximate_scores = ApproximateScores(self._queries, self._gallery, self._distance)
        pair_scores = PairScores(self._queries, self._gallery, self._distance)
        bytes_per_item = 16 * self._gallery.values.shape[1]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for block in self._memory_blocks(queries, bytes_per_score=6, bytes_per_item=bytes_per_item):
                items = self._items_of(block)
                if len(items.queries) == 0:
                    continue
                exact = self._exact_scores_of(items.queries, items.relevant)
                highest_first, order = exact.masked_fill(~items.is_relevant, -torch.inf).sort(dim=1, descending=True)
                approximate, offset, error = approximate_scores(items.queries)
                num_relevant, not_counted = items.is_relevant.sum(1), _not_counted(items)
                tensors = (approximate, offset, error, highest_first, num_relevant, not_counted, items.queries)
                counting = Counting(*(tensor.numpy() for tensor in tensors), pair_scores=pair_scores)
                num_ahead = torch.from_numpy(counting.num_ahead(pool))
                # Users may allow matrix products of lower precision, for which the error bound does not hold
                deviation = (approximate.gather(1, items.relevant) - offset[:, None] - exact).abs()
                is_done = (num_ahead[:, 0] >= 0) & ((deviation <= error[:, None]) | ~items.is_relevant).all(1)
                ranks = Ranks(items.queries, highest_first, num_ahead, items.is_relevant.gather(1, order))
                yield Ranks(*(part[is_done] for part in ranks))
                yield from self._by_sorting(items.queries[~is_done])

    def _memory_blocks(self, queries: Tensor, *, bytes_per_score: int, bytes_per_item: int) -> Iterator[Tensor]:
        """The queries, which must be ordered by their number of relevant items, in blocks that fit into the memory limit."""
        sizes = self._relevant.sizes()
        while len(queries):
            bytes_per_query = bytes_per_score * len(self._gallery) + bytes_per_item * sizes[queries]
            counts = torch.arange(1, len(queries) + 1, device=queries.device)
            num_queries = max(1, int((counts * bytes_per_query <= self._memory).sum()))
            yield queries[:num_queries]
            queries = queries[num_queries:]

    def _items_of(self, block: Tensor) -> _BlockItems:
        """The relevant and excluded items of the block's queries, without queries all of whose relevant items are excluded."""
        relevant, is_relevant = self._relevant.padded(block)
        excluded, is_excluded = self._excluded.padded(block)
        for column in range(excluded.shape[1]):
            is_relevant &= (relevant != excluded[:, column : column + 1]) | ~is_excluded[:, column : column + 1]
        has_relevant = is_relevant.any(1)
        return _BlockItems(*(tensor[has_relevant] for tensor in (block, relevant, is_relevant, excluded, is_excluded)))

    def _exact_scores_of(self, block: Tensor, positions: Tensor) -> Tensor:
        """Exact scores [B, R] of the items at positions [B, R], few queries at a time, so that their rows stay in the cache."""
        step = max(1, NUMBERS_AT_ONCE // (positions.shape[1] * self._gallery.values.shape[1]))
        parts = zip(block.split(step), positions.split(step), strict=True)
        scores = [
            exact_scores(self._queries[queries, None], self._gallery[items], self._distance) for queries, items in parts
        ]
        return torch.cat(scores)[:, 0]

    def _exact_scores_of_all(self, block: Tensor) -> Tensor:
        """Exact scores [B, G], a part of the gallery at a time, because its float64 copy takes memory."""
        step = max(1, self._memory // (16 * self._gallery.values.shape[1]))
        parts = [self._gallery[start : start + step] for start in range(0, len(self._gallery), step)]
        scores = [exact_scores(self._queries[block], part, self._distance) for part in parts]
        return torch.cat(scores, dim=1) if len(scores) > 1 else scores[0]


def _num_at_least(relevant: Tensor, scores: Tensor) -> Tensor:
    """[B, R] the number of scores [B, G] of a row that are at least as high as each relevant score [B, R] of the row.

    A GPU reads the scores once for every relevant item if there are few; otherwise the scores are sorted, in place on a CPU.
    """
    if scores.is_cuda and relevant.shape[1] <= COMPARED_AT_MOST:
        return torch.stack([(scores >= column).sum(1) for column in relevant.unsqueeze(2).unbind(1)], dim=1)
    return scores.shape[1] - torch.searchsorted(_sorted_rows(scores), relevant)


def _sorted_rows(scores: Tensor) -> Tensor:
    """Every row [B, G] in ascending order; NumPy sorts numbers several times faster on a CPU than torch does (measured)."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    rows, num_threads = scores.numpy(), torch.get_num_threads()
    if num_threads == 1 or rows.size < SORTED_BY_ONE_THREAD:
        rows.sort(axis=1)
        return scores
    size = math.ceil(len(rows) / num_threads)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda start: rows[start : start + size].sort(axis=1), range(0, len(rows), size)))
    return scores


def _not_counted(items: _BlockItems) -> Tensor:
    """[B, R + X] gallery positions of the relevant and the excluded items, padded with -1."""
    relevant = items.relevant.masked_fill(~items.is_relevant, -1)
    return torch.cat([relevant, items.excluded.masked_fill(~items.is_excluded, -1)], dim=1)
