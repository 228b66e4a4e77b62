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
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.retrieval.counting import Counting
from mas_embed.retrieval.similarity import ApproximateScores, Distance, LazyRows, PairScores, exact_scores
from mas_embed.runtime.distributed import cat_over_processes, gather_numbers, sum_over_processes

BYTES_PER_RELEVANT_ITEM = 64  # that is kept while the gallery is read
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


class _Chunk:
    """Consecutive gallery items that all blocks of queries are compared with before the next ones are read.

    Args:
        items: their positions in the gallery.
        approximate: a function that makes their approximate scores, when they are first needed.
    """

    def __init__(self, items: range, approximate: Callable[[], ApproximateScores]) -> None:
        self.items, self._make_approximate = items, approximate

    @cached_property
    def approximate(self) -> ApproximateScores:
        """The approximate scores of the items, which need a float32 copy of them."""
        return self._make_approximate()

    def positions(self, gallery_positions: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the chunk from those in the gallery, and which of them are valid and in the chunk; others are 0."""
        is_inside = is_valid & (gallery_positions >= self.items.start) & (gallery_positions < self.items.stop)
        return (gallery_positions - self.items.start).masked_fill(~is_inside, 0), is_inside


class _Block(NamedTuple):
    """A block of queries whose relevant items are scored, and what is counted for them so far.

    Attributes:
        items: the relevant and the excluded items.
        exact: [B, R] the exact scores of the relevant items; -inf where `items.is_relevant` is False.
        highest_first: [B, R] the same, sorted; of a sharded gallery the scores of the relevant items of all processes.
        num_ahead: [B, R] the number of irrelevant items that score at least as high, of the chunks so far.
        is_valid: [B, R] False for the padding, in the order of `highest_first`.
    """

    items: _BlockItems
    exact: Tensor
    highest_first: Tensor
    num_ahead: Tensor
    is_valid: Tensor

    @classmethod
    def of(cls, items: _BlockItems, scores: Tensor, *, is_sharded: bool) -> _Block:
        exact = scores.masked_fill(~items.is_relevant, -torch.inf)
        of_all = cat_over_processes(exact.T.contiguous()).T.contiguous() if is_sharded else exact
        highest_first = of_all.sort(dim=1, descending=True).values
        num_ahead = torch.zeros(of_all.shape, dtype=torch.long, device=exact.device)
        return cls(items, exact, highest_first, num_ahead, highest_first > -torch.inf)

    def select(self, rows: Tensor) -> _Block:
        """The block with some of its queries."""
        return _Block(_BlockItems(*(part[rows] for part in self.items)), *(part[rows] for part in self[1:]))


class Ranking:
    """Ranks the gallery for every query.

    The gallery is read in chunks, so that it need not fit into memory: the numbers of items ahead add up over chunks.

    Args:
        queries: Q rows, from `lazy_rows` together with the gallery.
        gallery: G rows.
        distance: the distance that the rows are prepared for.
        relevant: the relevant gallery items of every query.
        excluded: the gallery items that are left out of the ranking of a query, because they are the query itself.
        memory: approximate memory in bytes that a block of queries may take, and that a chunk of the gallery may.
        advance: called with the number of scores that were compared since the last call.
        is_sharded: whether `gallery`, with the lists of its items, is the share of this process, as each of those that work
            together has another one. All of them get the ranks in the gallery of all.
    """

    def __init__(
        self,
        queries: LazyRows,
        gallery: LazyRows,
        distance: Distance,
        *,
        relevant: PositionLists,
        excluded: PositionLists,
        memory: int,
        advance: Callable[[int], None] = lambda number: None,
        is_sharded: bool = False,
    ) -> None:
        self._queries, self._gallery, self._distance = queries, gallery, distance
        self._relevant, self._excluded, self._memory, self._advance = relevant, excluded, memory, advance
        self._pair_scores = PairScores(queries, gallery, distance)
        size = max(1, memory // (4 * gallery.num_dimensions))
        starts = range(0, len(gallery), math.ceil(len(gallery) / math.ceil(len(gallery) / size)))
        ranges = [range(start, min(start + starts.step, len(gallery))) for start in starts]
        self._only_chunk = self._chunk(ranges[0]) if len(ranges) == 1 else None
        self._ranges, self._is_sharded = ranges, is_sharded
        # Blocks of queries must be the same in all processes, and so must be what they depend on
        self._sizes, self._chunk_size, self._num_items = relevant.sizes(), max(map(len, ranges)), len(gallery)
        if is_sharded:
            self._num_items = sum_over_processes({"sizes": self._sizes}, len(gallery))
            self._chunk_size = max(gather_numbers(self._chunk_size))

    def blocks(self) -> Iterator[Ranks]:
        """The ranks of every query that has a relevant item, in blocks of queries with similarly many relevant items."""
        sizes = self._sizes
        by_size = sizes.argsort(stable=True)
        self._advance(int((sizes == 0).sum()) * len(self._gallery))
        by_size = by_size[sizes[by_size] > 0]
        is_counted = sizes[by_size] <= DENSE_SHARE * self._num_items
        if self._queries.device.type != "cpu":
            is_counted = torch.zeros_like(is_counted)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for queries, is_by_counting in ((by_size[is_counted], True), (by_size[~is_counted], False)):
                add = partial(self._add_by_counting, pool=pool) if is_by_counting else self._add_by_sorting
                for group in self._memory_blocks(queries, bytes_per_query=0, bytes_per_item=BYTES_PER_RELEVANT_ITEM):
                    yield from self._ranks_of(group, add, is_by_counting)

    def _ranks_of(
        self, queries: Tensor, add: Callable[[_Block, _Chunk], None], is_by_counting: bool
    ) -> Iterator[Ranks]:
        """The ranks of queries whose relevant items are in memory together, so that the gallery is read once for all of them.

        Args:
            queries: their positions, by the number of relevant items.
            add: adds the number of items of a chunk that are ahead to a block.
            is_by_counting: which of the two ways `add` is.
        """
        by_score, by_item = (6, 16 * self._gallery.num_dimensions) if is_by_counting else (48, 0)
        blocks = []
        for block in self._memory_blocks(queries, bytes_per_query=by_score * self._chunk_size, bytes_per_item=by_item):
            items = self._items_of(block)
            self._advance((len(block) - len(items.queries)) * len(self._gallery))
            if len(items.queries):
                scores = self._exact_scores_of(items.queries, items.relevant)
                blocks.append(_Block.of(items, scores, is_sharded=self._is_sharded))
        for chunk in map(self._chunk, self._ranges) if self._only_chunk is None else [self._only_chunk]:
            for one in blocks:
                add(one, chunk)
                self._advance(len(one.exact) * len(chunk.items))
        if self._is_sharded:
            sum_over_processes({str(index): one.num_ahead for index, one in enumerate(blocks)}, 0)
        for one in blocks:
            yield Ranks(one.items.queries, one.highest_first, one.num_ahead, one.is_valid)

    def _chunk(self, items: range) -> _Chunk:
        make = partial(ApproximateScores, self._queries, self._gallery, self._distance, items)
        return _Chunk(items, make)

    def _add_by_sorting(self, block: _Block, chunk: _Chunk) -> None:
        """Counts by exact scores of all items of the chunk: see `_num_at_least`."""
        items = block.items
        scores = self._exact_scores_of_all(items.queries, chunk.items)
        for gallery_positions, is_valid in ((items.relevant, items.is_relevant), (items.excluded, items.is_excluded)):
            positions, is_inside = chunk.positions(gallery_positions, is_valid)
            scores[is_inside.nonzero()[:, 0], positions[is_inside]] = -torch.inf
        block.num_ahead.add_(_num_at_least(block.highest_first, scores))

    def _add_by_counting(self, block: _Block, chunk: _Chunk, *, pool: Executor) -> None:
        """Counts by approximate scores, or by sorting for queries whose approximate scores leave too much in doubt."""
        items, start = block.items, chunk.items.start
        positions, is_inside = chunk.positions(items.relevant, items.is_relevant)
        excluded, is_excluded = chunk.positions(items.excluded, items.is_excluded)
        not_counted = torch.cat([positions.masked_fill(~is_inside, -1), excluded.masked_fill(~is_excluded, -1)], dim=1)
        approximate, offset, error = chunk.approximate(items.queries)
        num_relevant = block.is_valid.sum(1)
        tensors = (approximate, offset, error, block.highest_first, num_relevant, not_counted, items.queries)
        counting = Counting(
            *(tensor.numpy() for tensor in tensors),
            pair_scores=lambda queries, inside: self._pair_scores(queries, inside + start),
        )
        num_ahead = torch.from_numpy(counting.num_ahead(pool))
        # Users may allow matrix products of lower precision, for which the error bound does not hold
        deviation = (approximate.gather(1, positions) - offset[:, None] - block.exact).abs()
        is_done = (num_ahead[:, 0] >= 0) & ((deviation <= error[:, None]) | ~is_inside).all(1)
        block.num_ahead[is_done] += num_ahead[is_done]
        if not bool(is_done.all()):
            self._sort_some(block, chunk, ~is_done)

    def _sort_some(self, block: _Block, chunk: _Chunk, rows: Tensor) -> None:
        """Counts by sorting for some queries of a block."""
        size = max(1, self._memory // (48 * len(chunk.items)))
        for some in rows.nonzero()[:, 0].split(size):
            part = block.select(some)
            before = part.num_ahead.clone()
            self._add_by_sorting(part, chunk)
            block.num_ahead[some] += part.num_ahead - before

    def _memory_blocks(self, queries: Tensor, *, bytes_per_query: int, bytes_per_item: int) -> Iterator[Tensor]:
        """The queries, which must be ordered by their number of relevant items, in blocks that fit into the memory limit."""
        while len(queries):
            needed = bytes_per_query + bytes_per_item * self._sizes[queries]
            counts = torch.arange(1, len(queries) + 1, device=queries.device)
            num_queries = max(1, int((counts * needed <= self._memory).sum()))
            yield queries[:num_queries]
            queries = queries[num_queries:]

    def _items_of(self, block: Tensor) -> _BlockItems:
        """The relevant and excluded items of the block's queries, without queries all of whose relevant items are excluded."""
        relevant, is_relevant = self._relevant.padded(block)
        excluded, is_excluded = self._excluded.padded(block)
        for column in range(excluded.shape[1]):
            is_relevant &= (relevant != excluded[:, column : column + 1]) | ~is_excluded[:, column : column + 1]
        num_relevant = is_relevant.sum(1)
        if self._is_sharded:
            sum_over_processes({"relevant": num_relevant}, 0)
        has_relevant = num_relevant > 0
        return _BlockItems(*(tensor[has_relevant] for tensor in (block, relevant, is_relevant, excluded, is_excluded)))

    def _exact_scores_of(self, block: Tensor, positions: Tensor) -> Tensor:
        """Exact scores [B, R] of the items at positions [B, R], few queries at a time, so that their rows stay in the cache."""
        if positions.shape[1] == 0:
            return torch.empty(positions.shape, dtype=torch.float64, device=positions.device)
        step = max(1, NUMBERS_AT_ONCE // (positions.shape[1] * self._gallery.num_dimensions))
        parts = zip(block.split(step), positions.split(step), strict=True)
        scores = [
            exact_scores(
                self._queries[queries].reshaped(len(queries), 1),
                self._gallery[items.flatten()].reshaped(*items.shape),
                self._distance,
            )
            for queries, items in parts
        ]
        return torch.cat(scores)[:, 0]

    def _exact_scores_of_all(self, block: Tensor, items: range) -> Tensor:
        """Exact scores [B, G] of a range of items, a part of them at a time, because their float64 copy takes memory."""
        step = max(1, self._memory // (16 * self._gallery.num_dimensions))
        queries = self._queries[block]
        ends = [(start, min(start + step, items.stop)) for start in items[::step]]
        scores = [exact_scores(queries, self._gallery[start:end], self._distance) for start, end in ends]
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
