"""Similarity scores of queries and gallery items, where a higher score is nearer: exact, or approximate with an error bound.

Exact scores are computed in float64 and rounded from 53 to 34 binary digits. Scores that differ only by the order in which
their terms were added become equal, so that equal items tie. Scores that are small integers are not changed by the rounding.

Q queries, G gallery items, B queries in a block, P pairs, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import ROWS_AT_ONCE
from mas_embed.runtime.checks import shown
from mas_embed.runtime.distributed import cat_over_processes

Transform = Callable[[Tensor], Tensor]
Distance = Literal["cosine", "euclidean", "inner_product"]
DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean", "inner_product")

PREPARED_BYTES = 2**26  # of embeddings on a CPU that are prepared once, and not whenever they are read
_RESOLUTION = 2.0**-34


@dataclass(frozen=True)
class Rows:
    """Embeddings prepared for one distance.

    Attributes:
        values: [N, D] float32 or float64, divided by a power of two so that they are of moderate size; this does not round.
        divisor: [N] float64 number by which inner products of the row are divided: its length under "cosine", else 1.
        grid: [N] float64 scale of the rounding: a score of two rows is rounded to a multiple of `2^-34 grid_q grid_g`.
    """

    values: Tensor
    divisor: Tensor
    grid: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.values[index], self.divisor[index], self.grid[index])

    def reshaped(self, *shape: int) -> Rows:
        """The same rows with several leading dimensions."""
        return Rows(self.values.reshape(*shape, -1), self.divisor.reshape(shape), self.grid.reshape(shape))


class LazyRows:
    """Embeddings that are prepared for a distance when they are read, so that a mapped file is never in memory as a whole.

    Few rows, and those on a GPU, are prepared once.

    Args:
        values: [N, D] the embeddings.
        scale: the power of two by which all rows are divided; None under "cosine", where every row has its own.
        transform: what is done to embeddings before they are prepared, some rows at a time; None for nothing.
        name: of the embeddings, for errors.

    Raises:
        UserError: a row is zero under "cosine", or transformed rows are not finite; of many rows when they are read.
    """

    def __init__(self, values: Tensor, scale: Tensor | None, transform: Transform | None = None, *, name: str) -> None:
        self._values, self._scale, self._transform, self._name = values, scale, transform, name
        self.device, self.num_dimensions = values.device, values.shape[1]
        is_small = values.numel() * values.element_size() <= PREPARED_BYTES
        self._prepared = self._prepare(values) if values.device.type != "cpu" or is_small else None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Rows:
        return self._prepare(self._values[index]) if self._prepared is None else self._prepared[index]

    def blocks(self, rows: range) -> Iterator[Rows]:
        """The rows of a range, few at a time."""
        for start in range(rows.start, rows.stop, ROWS_AT_ONCE):
            yield self[start : min(start + ROWS_AT_ONCE, rows.stop)]

    def _prepare(self, values: Tensor) -> Rows:
        if self._transform is not None and len(values):
            values = self._transform(values)
            if not bool(values.isfinite().all()):
                raise UserError(f"{self._name} contain NaN or infinite embeddings after compensation")
        values = _as_floating(values)
        if self._scale is not None:
            return _rows_divided_by(values, self._scale)
        if bool((values == 0).all(1).any()):
            raise UserError(
                f"{self._name} contain an all-zero embedding, which has no cosine; use distance='euclidean' or 'inner_product'"
            )
        return _rows_with_lengths(values)


def check_distance(distance: str) -> None:
    """Raises `UserError` if the distance is not one of `DISTANCES`."""
    if not isinstance(distance, str) or distance not in DISTANCES:
        raise UserError(f"distance must be one of {', '.join(DISTANCES)}, got {shown(distance)}")


def prepare_rows(queries: Tensor, gallery: Tensor, distance: Distance) -> tuple[Rows, Rows]:
    """The queries [Q, D] and the gallery [G, D] prepared for the distance; every query ranks the gallery as before.

    All values must be finite. Rows are divided by powers of two, so that products neither overflow nor underflow.

    Raises:
        UserError: queries and gallery differ in D or in their device, a row is zero under "cosine", or the distance does not
            exist.
    """
    prepared_queries, prepared_gallery = lazy_rows(queries, gallery, distance)
    return prepared_queries[:], prepared_gallery[:]


def lazy_rows(
    queries: Tensor,
    gallery: Tensor,
    distance: Distance,
    transform: Transform | None = None,
    *,
    is_sharded: bool = False,
) -> tuple[LazyRows, LazyRows]:
    """As `prepare_rows`, of rows that are prepared when they are read.

    Args:
        queries: [Q, D].
        gallery: [G, D].
        distance: that the rows are prepared for.
        transform: what is done to gallery rows first, some at a time; None for nothing.
        is_sharded: whether the gallery is the share of this process, as each of those that work together has another one.
    """
    check_distance(distance)
    if queries.shape[1] != gallery.shape[1]:
        sizes = f"queries have {queries.shape[1]} dimensions and the gallery {gallery.shape[1]}"
        raise UserError(f"{sizes}; embed both with one model")
    if queries.device != gallery.device:
        raise UserError(f"queries are on {queries.device} and the gallery on {gallery.device}; move both to one device")
    if distance == "cosine":
        return LazyRows(queries, None, name="queries"), LazyRows(gallery, None, transform, name="gallery")
    # Of a transformed gallery the scale is that before, which is near enough: it only has to be of the same magnitude
    largest = [_largest_value(rows) for rows in (queries, gallery)]
    if is_sharded:
        largest = list(cat_over_processes(torch.stack(largest).unsqueeze(0)).amax(0))
    scales = [_power_of_two_below(value) for value in largest]
    if distance == "euclidean":
        scales = [torch.maximum(*scales)] * 2
    return LazyRows(queries, scales[0], name="queries"), LazyRows(gallery, scales[1], transform, name="gallery")


def _largest_value(rows: Tensor) -> Tensor:
    """The largest absolute value of embeddings [N, D], which are read some rows at a time."""
    return torch.stack([_as_floating(block).abs().amax() for block in rows.split(ROWS_AT_ONCE)]).amax()


def exact_scores(queries: Rows, gallery: Rows, distance: Distance) -> Tensor:
    """The exact scores [..., Q, G] of all pairs of rows [..., Q, D] and [..., G, D], in float64."""
    query_values, gallery_values = queries.values.double(), gallery.values.double()
    if distance == "euclidean":
        distances = torch.cdist(query_values, gallery_values, compute_mode="donot_use_mm_for_euclid_dist")
        return -_round_to_34_digits(distances.square())
    products = query_values @ gallery_values.mT
    if distance == "cosine":  # every grid is 1, and scaling by a power of two is exact: all of it can be done in place
        products /= queries.divisor.unsqueeze(-1) * gallery.divisor.unsqueeze(-2)
        return products.mul_(1 / _RESOLUTION).round_().mul_(_RESOLUTION)
    return _round_to_grid(products, queries.grid.unsqueeze(-1) * gallery.grid.unsqueeze(-2))


class PairScores:
    """Computes `exact_scores` of given pairs on the CPU, in NumPy, so that it can be called from several threads at once."""

    def __init__(self, queries: LazyRows, gallery: LazyRows, distance: Distance) -> None:
        self._queries, self._gallery, self._distance = queries, gallery, distance

    def __call__(self, query_index: NDArray[np.intp], gallery_index: NDArray[np.intp]) -> NDArray[np.float64]:
        """The exact scores [P] of P pairs, given by the positions of their queries [P] and of their gallery items [P]."""
        chosen = self._queries[torch.from_numpy(query_index)], self._gallery[torch.from_numpy(gallery_index)]
        queries, items = (rows.values.numpy().astype(np.float64) for rows in chosen)
        (query_divisor, query_grid), (item_divisor, item_grid) = (
            (rows.divisor.numpy(), rows.grid.numpy()) for rows in chosen
        )
        scores: NDArray[np.float64]
        if self._distance == "euclidean":
            difference = queries - items
            scores = -_round_to_34_digits(np.sqrt(np.einsum("pd,pd->p", difference, difference)) ** 2)
        else:
            products = np.einsum("pd,pd->p", queries, items) / (query_divisor * item_divisor)
            scores = _round_to_grid(products, query_grid * item_grid)
        return scores


class ApproximateScores:
    """Computes float32 scores by one matrix product, with a bound on their difference from the exact scores.

    Under "euclidean" the approximate score is `2 q.g - |g|^2`. It exceeds the exact score `-|q - g|^2` by the offset `|q|^2`,
    which is the same for all items and does not change the ranking. Under other distances the offset is zero.

    Args:
        queries: Q rows.
        gallery: the rows of which G are scored; a float32 copy of these is stored.
        distance: that the rows were prepared for.
        items: the positions of the G rows in the gallery; None for all.
    """

    def __init__(self, queries: LazyRows, gallery: LazyRows, distance: Distance, items: range | None = None) -> None:
        items = range(len(gallery)) if items is None else items
        self._queries, self._centre = queries, None
        if distance == "euclidean":
            self._centre = mean_of_rows(gallery, items)
        rows_GD = torch.empty(len(items), gallery.num_dimensions, device=gallery.device)
        for start, block in zip(range(0, len(items), ROWS_AT_ONCE), gallery.blocks(items), strict=True):
            rows_GD[start : start + len(block)] = self._float32(block)
        self._gallery_DG = rows_GD.T
        lengths = rows_GD.norm(dim=1).double()
        self._longest = lengths.max()
        # Reused, because allocating memory for every block would take a third as long as the product itself
        self._scores = rows_GD.new_empty(0, 0)
        self._squares = None
        if distance == "euclidean":
            self._squares = torch.cat([part.double().square().sum(1) for part in rows_GD.split(ROWS_AT_ONCE)]).float()

    def __call__(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scores [B, G] of the queries at positions `block` [B] in float32, their offsets [B] and their error bounds [B].

        The exact score lies within the error bound of the approximate score minus the offset. The next call overwrites the
        scores.

        The error of a sum of D products in float32, in any order, is less than `D u |q| |g|` with u = 2^-24. Another 16 u
        cover the rounding of the rows and of the numbers that are compared with the scores.
        """
        rows = self._float32(self._queries[block])
        lengths = rows.double().norm(dim=1)
        rounding = (rows.shape[1] + 16) * 2.0**-24
        if len(self._scores) < len(block):
            self._scores = rows.new_empty(len(block), self._gallery_DG.shape[1])
        scores = self._scores[: len(block)]
        if self._squares is None:
            torch.mm(rows, self._gallery_DG, out=scores)
            return scores, torch.zeros_like(lengths), rounding * lengths * self._longest
        torch.addmm(-self._squares, rows, self._gallery_DG, alpha=2, out=scores)
        return scores, lengths.square(), rounding * (lengths + self._longest).square()

    def _float32(self, rows: Rows) -> Tensor:
        if self._centre is not None:  # centring does not change distances, and reduces their rounding errors in float32
            return (rows.values - self._centre).float()
        return (rows.values / rows.divisor.unsqueeze(1).to(rows.values.dtype)).float()


def mean_of_rows(rows: LazyRows, items: range) -> Tensor:
    """The mean [D] of the prepared values of some rows, in their dtype, summed in float64."""
    sums = [block.values.sum(0, dtype=torch.float64) for block in rows.blocks(items)]
    return (torch.stack(sums).sum(0) / len(items)).to(rows[items.start : items.start + 1].values.dtype)


def _as_floating(rows: Tensor) -> Tensor:
    """The rows in float32 or, if they are float64 or integers, in float64."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32) if rows.is_floating_point() else torch.float64)


def _rows_with_lengths(rows: Tensor) -> Rows:
    """Rows for "cosine": their lengths are the divisors."""
    values, lengths = _rescaled(rows)
    return Rows(values, lengths, torch.ones_like(lengths))


def _rows_divided_by(rows: Tensor, scale: Tensor) -> Rows:
    """Rows for "euclidean" and "inner_product": all are divided by one power of two, and the divisors are 1."""
    values = rows / scale.to(rows.dtype)
    _, lengths = _rescaled(values)
    return Rows(
        values, torch.ones_like(lengths), _power_of_two_below(lengths) * _power_of_two_below(values.abs().amax(1))
    )


def _rescaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [N, D] divided by a power of two, so that no square overflows or underflows, and the lengths [N] after that."""
    values = rows / _power_of_two_below(rows.abs().amax(1, keepdim=True)).to(rows.dtype)
    return values, torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)


def _power_of_two_below(sizes: Tensor) -> Tensor:
    """The largest power of two that is at most each size >= 0, in float64; 1 for a size of zero."""
    sizes = sizes.double()
    return torch.where(sizes > 0, torch.exp2(torch.floor(torch.log2(sizes))), 1.0)


def _round_to_grid(products: Any, grid: Any) -> Any:
    """The products, a tensor or an array, rounded to multiples of `2^-34 grid`."""
    step = grid * _RESOLUTION
    step = step + (step == 0)  # the grid underflows if both rows are very short
    return (products / step).round() * step


def _round_to_34_digits(squared: Any) -> Any:
    """The squared distances, a tensor or an array, rounded to 34 significant binary digits by Veltkamp's splitting."""
    shifted = squared * (2.0**19 + 1)
    return shifted - (shifted - squared)
