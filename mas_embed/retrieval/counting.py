"""Counts the irrelevant items that score at least as high as each relevant one, from float32 scores with an error bound.

Every query has bins that divide the range from its lowest to its highest relevant score. Because the arithmetic that computes
the bin of a score is monotone, an item in a higher bin than `score + error` of a relevant item ranks ahead of it, and an item
in a lower bin than `score - error` does not. The bins in between are open, the others are closed. Among the items in open
bins, those within the error of a relevant item are doubtful: they are scored again, exactly.

G gallery items, B queries in a block, M queries in a group of the block, R the largest number of relevant items of a query,
X the largest number of items of a query that are not counted, P pairs of a query and an item.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 8192
CROWDED_SHARE = 1 / 4  # of the gallery that is doubtful: above it, sorting is faster than counting
SCORES_AT_ONCE = 2**19  # large enough that the work outweighs the overhead of the NumPy calls
QUERIES_AT_ONCE = 256  # at most, so that float32 holds the bin numbers of a group exactly

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Counting:
    """The scores of one block of queries, and the method that counts the items ahead of their relevant items.

    Attributes:
        approximate: [B, G] float32 scores of all gallery items.
        offset: [B] the constant by which the approximate scores of a query exceed its exact scores, up to `error`.
        error: [B] the bound on the error of the approximate scores.
        scores: [B, R] exact scores of the relevant items, highest first, padded with -inf.
        num_relevant: [B] the number of relevant items, at least one each.
        not_counted: [B, X] gallery positions of the items that are not counted, which are the relevant items and the
            excluded ones, padded with -1.
        queries: [B] positions of the queries.
        pair_scores: computes exact scores from the positions of queries and of gallery items.
    """

    approximate: NDArray[np.float32]
    offset: Floats
    error: Floats
    scores: Floats
    num_relevant: Integers
    not_counted: Integers
    queries: Integers
    _: KW_ONLY
    pair_scores: Callable[[Integers, Integers], Floats]

    def num_ahead(self, pool: Executor) -> Integers:
        """[B, R] irrelevant items that score at least as high; a row of -1 for a query with too many doubtful items."""
        num_ahead = np.full(self.scores.shape, -1, dtype=np.int64)
        size = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // self.approximate.shape[1]))
        groups = [slice(start, start + size) for start in range(0, len(self.approximate), size)]
        list(pool.map(lambda group: self._fill_num_ahead(group, num_ahead[group]), groups))
        return num_ahead

    def _fill_num_ahead(self, group: slice, num_ahead: Integers) -> None:
        """Writes the counts of a group of queries into `num_ahead` [M, R]."""
        num_certain, rows, items, values = self._count_closed_bins(group)
        relevant = _RelevantScores(self.scores[group], values)
        is_doubtful = relevant.distance_to_nearest(rows, values) <= self.error[group][rows]
        num_doubtful = np.bincount(rows[is_doubtful], minlength=len(num_ahead))
        is_crowded = num_doubtful > CROWDED_SHARE * self.approximate.shape[1]
        is_doubtful &= ~is_crowded[rows]
        values[is_doubtful] = self.pair_scores(self.queries[group][rows[is_doubtful]], items[is_doubtful])
        num_ahead[:] = num_certain + relevant.num_at_least(rows, values)
        num_ahead[is_crowded] = -1

    def _count_closed_bins(self, group: slice) -> tuple[Integers, Integers, Integers, Floats]:
        """Counts the items in closed bins, and finds the items in open bins.

        Returns:
            The number of items in closed bins above each relevant item [M, R]; then, for the P items in open bins, their
            rows in the group, their gallery positions and their approximate scores without the offset, [P] each.
        """
        approximate, scores, not_counted = self.approximate[group], self.scores[group], self.not_counted[group]
        offset, error = self.offset[group, None], self.error[group, None]
        row_numbers = np.arange(len(approximate))
        lowest_score = scores[row_numbers, self.num_relevant[group] - 1][:, None]
        bins_of = _Bins(lowest_score + offset - error, scores[:, :1] + offset + error)
        edges = np.maximum(scores, lowest_score) + offset
        lowest, highest = bins_of(edges - error), bins_of(edges + error)
        is_open = _marked_ranges(lowest, highest, len(approximate) * (BINS + 2))
        bins = bins_of(approximate)
        rows, columns = np.nonzero(not_counted >= 0)
        bins[rows, not_counted[rows, columns]] = rows * (BINS + 2)  # the bin below all relevant items
        closed = np.bincount(bins.ravel(), minlength=len(is_open))
        closed *= ~is_open
        up_to = closed.reshape(len(approximate), -1).cumsum(1)
        num_certain = up_to[:, -1:] - up_to.ravel()[highest]
        rows, items = np.divmod(np.flatnonzero(is_open.take(bins)), approximate.shape[1])
        return num_certain, rows, items, approximate[rows, items] - self.offset[group][rows]


class _RelevantScores:
    """The scores of the relevant items of M queries, as one sorted list in which other scores can be looked up.

    Args:
        highest_first: [M, R] scores of the relevant items, padded with -inf.
        values: [P] scores that will be looked up.
    """

    def __init__(self, highest_first: Floats, values: Floats) -> None:
        self._ascending = highest_first[:, ::-1]  # starts with -inf in a row of fewer than R relevant items
        finite = np.where(np.isfinite(self._ascending), self._ascending, 0)
        limit = max(np.abs(finite).max(), np.abs(values).max(initial=0)) + 1
        self._spacing = 4 * limit  # between the keys of consecutive rows, so that rows do not overlap
        self._keys = (
            np.maximum(self._ascending, -2 * limit) + self._first_key(np.arange(len(finite)))[:, None]
        ).ravel()

    def distance_to_nearest(self, rows: Integers, values: Floats) -> Floats:
        """The distance [P] from each value to the nearest relevant score of its row, up to rounding in float64."""
        num_not_above = self._num_not_above(rows, values)
        last = self._ascending.shape[1] - 1
        below, above = (
            self._ascending[rows, (num_not_above - 1).clip(min=0)],
            self._ascending[rows, num_not_above.clip(max=last)],
        )
        distance: Floats = np.minimum(np.abs(values - below), np.abs(values - above))
        return distance

    def num_at_least(self, rows: Integers, values: Floats) -> Integers:
        """The number of values that are at least as high as each relevant score of their row, [M, R], highest score first."""
        num_rows, num_relevant = self._ascending.shape
        num_not_above = self._num_not_above(rows, values)
        # Adding the row's key has rounded the scores, so the numbers are corrected by exact comparisons
        while (
            is_too_low := (num_not_above < num_relevant)
            & (self._ascending[rows, num_not_above.clip(max=num_relevant - 1)] <= values)
        ).any():
            num_not_above += is_too_low
        while (
            is_too_high := (num_not_above > 0) & (self._ascending[rows, (num_not_above - 1).clip(min=0)] > values)
        ).any():
            num_not_above -= is_too_high
        counts = np.bincount(rows * (num_relevant + 1) + num_not_above, minlength=num_rows * (num_relevant + 1))
        return counts.reshape(num_rows, -1)[:, :0:-1].cumsum(1)

    def _num_not_above(self, rows: Integers, values: Floats) -> Integers:
        """The number [P] of relevant scores of its row that are not above each value, up to rounding in float64."""
        found = np.searchsorted(self._keys, values + self._first_key(rows), side="right")
        return found - rows * self._ascending.shape[1]

    def _first_key(self, rows: Integers) -> Floats:
        return rows * self._spacing


class _Bins:
    """Maps scores [M, ...] to bin numbers by monotone float32 arithmetic.

    Scores between `low` and `high` [M, 1] fall into the bins 1 to `BINS` of their row, lower scores into bin 0 and higher
    scores into bin `BINS + 1`. The bin numbers of a row continue those of the row before.
    """

    def __init__(self, low: Floats, high: Floats) -> None:
        self._low = low.astype(np.float32)
        self._scale = ((BINS - 1) / np.maximum(high - low, 1e-30)).astype(
            np.float32
        )  # BINS - 1: `high` is in bin `BINS`
        self._first = (np.arange(len(low)) * (BINS + 2))[:, None].astype(np.float32)

    def __call__(self, scores: NDArray[np.float32] | Floats) -> Integers:
        bins = np.subtract(scores, self._low, dtype=np.float32)
        bins *= self._scale
        bins += 1
        np.clip(bins, 0, BINS + 1, out=bins)
        bins += self._first  # at most 2^24, so float32 holds the integer part exactly
        return bins.astype(np.int64)


def _marked_ranges(lowest: Integers, highest: Integers, size: int) -> NDArray[np.bool_]:
    """A mask [size] that is True from each lowest to the highest bin with the same index."""
    is_marked = np.zeros(size, dtype=bool)
    is_marked[lowest] = is_marked[highest] = True
    for first, last in zip(lowest[highest - lowest > 1], highest[highest - lowest > 1], strict=True):
        is_marked[first:last] = True
    return is_marked
