"""How many irrelevant items score at least as high as each relevant one, from quick scores whose error is bounded.

The scores of a query fall into bins between its lowest and highest relevant item. Bins are as monotone as the arithmetic that
finds them: an item in a higher bin than `score + error` of a relevant item is ahead of it, one in a lower bin than
`score - error` is not. The bins between are open: of the items in them, those that are within the error of a relevant item
are scored exactly.

G gallery items, B queries of a block, M of them at once, R relevant items of a query at most.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from mas_embed.retrieval.similarity import PairScores

BINS = 8192
CROWDED_SHARE = 1 / 4  # of the gallery that is in doubt: from here on sorting is faster
SCORES_AT_ONCE = 2**19  # outweigh the calls
QUERIES_AT_ONCE = 256  # at most, so that the numbers of their bins are exact in float32

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Counting:
    """The counts of one block of queries.

    Attributes:
        quick: scores [B, G] float32.
        offset: [B] what quick scores exceed exact ones by, up to
        error: [B].
        scores: [B, R] exact, of the relevant items, highest first, then -inf.
        num_relevant: [B] how many of them there are, at least one each.
        known: [B, L] gallery positions that are not counted: relevant items and the query's own; -1 for none.
        queries: [B] their positions.
        pair_scores: exact scores by positions of queries and of gallery items.
    """

    quick: NDArray[np.float32]
    offset: Floats
    error: Floats
    scores: Floats
    num_relevant: Integers
    known: Integers
    queries: Integers
    _: KW_ONLY
    pair_scores: PairScores

    def run(self, pool: Executor) -> Integers:
        """[B, R]; a row of -1 for a query with too many items in doubt."""
        num_ahead = np.full(self.scores.shape, -1, dtype=np.int64)
        size = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // self.quick.shape[1]))
        groups = [slice(start, start + size) for start in range(0, len(self.quick), size)]
        list(pool.map(lambda group: self._count(group, num_ahead[group]), groups))
        return num_ahead

    def _count(self, group: slice, num_ahead: Integers) -> None:
        """Fills in `num_ahead` [M, R] of a group of queries."""
        certain, rows, items, values = self._scan(group)
        relevant = _Relevant(self.scores[group], values)
        is_doubtful = relevant.distance(rows, values) <= self.error[group][rows]
        is_crowded = np.bincount(rows[is_doubtful], minlength=len(num_ahead)) > CROWDED_SHARE * self.quick.shape[1]
        is_doubtful &= ~is_crowded[rows]
        values[is_doubtful] = self.pair_scores(self.queries[group][rows[is_doubtful]], items[is_doubtful])
        num_ahead[:] = certain + relevant.num_at_least(rows, values)
        num_ahead[is_crowded] = -1

    def _scan(self, group: slice) -> tuple[Integers, Integers, Integers, Floats]:
        """The passes over all scores of a group.

        Returns:
            How many items are in closed bins above each relevant item [M, R]; and of the items in open bins their rows,
            gallery positions and values.
        """
        quick, scores, known = self.quick[group], self.scores[group], self.known[group]
        offset, error = self.offset[group, None], self.error[group, None]
        num_rows = np.arange(len(quick))
        least = scores[num_rows, self.num_relevant[group] - 1][:, None]
        bins_of = _Bins(least + offset - error, scores[:, :1] + offset + error)
        edges = np.maximum(scores, least) + offset
        lowest, highest = bins_of(edges - error), bins_of(edges + error)
        is_open = _marked(lowest, highest, len(quick) * (BINS + 2))
        bins = bins_of(quick)
        rows, places = np.nonzero(known >= 0)
        bins[rows, known[rows, places]] = rows * (BINS + 2)  # below all relevant items: not counted
        closed = np.bincount(bins.ravel(), minlength=len(is_open))
        closed *= ~is_open
        up_to = closed.reshape(len(quick), -1).cumsum(1)
        certain = up_to[:, -1:] - up_to.ravel()[highest]
        rows, items = np.divmod(np.flatnonzero(is_open.take(bins)), quick.shape[1])
        return certain, rows, items, quick[rows, items] - self.offset[group][rows]


class _Relevant:
    """The scores of the relevant items of M queries, to look up others among them, all rows in one sorted list."""

    def __init__(self, highest_first: Floats, values: Floats) -> None:
        self._ascending = highest_first[:, ::-1]  # -inf first, where a query has fewer than R
        finite = np.where(np.isfinite(self._ascending), self._ascending, 0)
        reach = max(np.abs(finite).max(), np.abs(values).max(initial=0)) + 1
        self._spacing = 4 * reach  # from one row to the next
        self._keys = (
            np.maximum(self._ascending, -2 * reach) + self._first_key(np.arange(len(finite)))[:, None]
        ).ravel()

    def distance(self, rows: Integers, values: Floats) -> Floats:
        """From each value [P] to the nearest relevant item of its row, but for rounding in float64."""
        place = self._place(rows, values)
        last = self._ascending.shape[1] - 1
        below, above = self._ascending[rows, (place - 1).clip(min=0)], self._ascending[rows, place.clip(max=last)]
        distance: Floats = np.minimum(np.abs(values - below), np.abs(values - above))
        return distance

    def num_at_least(self, rows: Integers, values: Floats) -> Integers:
        """How many of the values [P] are at least as high as each relevant item of their row, [M, R], highest item first."""
        num_rows, num_relevant = self._ascending.shape
        place = self._place(rows, values)
        # Adding the key of the row has rounded; now exactly: the items at places below are those that are not higher
        while (
            is_low := (place < num_relevant) & (self._ascending[rows, place.clip(max=num_relevant - 1)] <= values)
        ).any():
            place += is_low
        while (is_high := (place > 0) & (self._ascending[rows, (place - 1).clip(min=0)] > values)).any():
            place -= is_high
        counts = np.bincount(rows * (num_relevant + 1) + place, minlength=num_rows * (num_relevant + 1))
        return counts.reshape(num_rows, -1)[:, :0:-1].cumsum(1)

    def _place(self, rows: Integers, values: Floats) -> Integers:
        """The number of relevant items that are not higher than each value."""
        found = np.searchsorted(self._keys, values + self._first_key(rows), side="right")
        return found - rows * self._ascending.shape[1]

    def _first_key(self, rows: Integers) -> Floats:
        return rows * self._spacing


class _Bins:
    """Puts scores [M, ...] into bins by monotone float32 arithmetic.

    They are 1 .. `BINS` from `low` to `high` [M, 1], 0 below, `BINS + 1` above; those of a row follow those of the row before.
    """

    def __init__(self, low: Floats, high: Floats) -> None:
        self._low = low.astype(np.float32)
        self._scale = ((BINS - 1) / np.maximum(high - low, 1e-30)).astype(np.float32)  # so that `high` is not above
        self._first = (np.arange(len(low)) * (BINS + 2))[:, None].astype(np.float32)

    def __call__(self, scores: NDArray[np.float32] | Floats) -> Integers:
        places = np.subtract(scores, self._low, dtype=np.float32)
        places *= self._scale
        places += 1
        np.clip(places, 0, BINS + 1, out=places)
        places += self._first  # whole numbers that float32 holds: at most 2^24
        return places.astype(np.int64)


def _marked(lowest: Integers, highest: Integers, size: int) -> NDArray[np.bool_]:
    """[size] True from each lowest to its highest bin."""
    is_marked = np.zeros(size, dtype=bool)
    is_marked[lowest] = is_marked[highest] = True
    for first, last in zip(lowest[highest - lowest > 1], highest[highest - lowest > 1], strict=True):
        is_marked[first:last] = True
    return is_marked
