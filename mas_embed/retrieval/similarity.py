"""Similarity scores of queries and gallery items, where a higher score is nearer: exact, or approximate with an error bound.

Exact scores are computed in float64 and rounded from 53 to 34 binary digits. Scores that differ only by the order in which
their terms were added become equal, so that equal items tie. Scores that are small integers are not changed by the rounding.

Q queries, G gallery items, B queries in a block, P pairs, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.checks import shown

Distance = Literal["cosine", "euclidean", "inner_product"]
DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean", "inner_product")

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
    check_distance(distance)
    if queries.shape[1] != gallery.shape[1]:
        sizes = f"queries have {queries.shape[1]} dimensions and the gallery {gallery.shape[1]}"
        raise UserError(f"{sizes}; embed both with one model")
    if queries.device != gallery.device:
        raise UserError(f"queries are on {queries.device} and the gallery on {gallery.device}; move both to one device")
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if distance == "cosine" and bool((rows == 0).all(1).any()):
            raise UserError(
                f"{name} contain an all-zero embedding, which has no cosine; use distance='euclidean' or 'inner_product'"
            )
    queries, gallery = _as_floating(queries), _as_floating(gallery)
    if distance == "cosine":
        return _rows_with_lengths(queries), _rows_with_lengths(gallery)
    scales = _power_of_two_below(queries.abs().amax()), _power_of_two_below(gallery.abs().amax())
    if distance == "euclidean":
        scales = (torch.maximum(*scales),) * 2
    return _rows_divided_by(queries, scales[0]), _rows_divided_by(gallery, scales[1])


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

    def __init__(self, queries: Rows, gallery: Rows, distance: Distance) -> None:
        self._queries, self._gallery = (
            (rows.values.numpy(), rows.divisor.numpy(), rows.grid.numpy()) for rows in (queries, gallery)
        )
        self._distance = distance

    def __call__(self, query_index: NDArray[np.intp], gallery_index: NDArray[np.intp]) -> NDArray[np.float64]:
        """The exact scores [P] of P pairs, given by the positions of their queries [P] and of their gallery items [P]."""
        queries, query_divisor, query_grid = (array[query_index] for array in self._queries)
        items, item_divisor, item_grid = (array[gallery_index] for array in self._gallery)
        queries, items = queries.astype(np.float64), items.astype(np.float64)
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
    """

    def __init__(self, queries: Rows, gallery: Rows, distance: Distance) -> None:
        self._centre = gallery.values.mean(0) if distance == "euclidean" else None
        self._queries, self._gallery_DG = queries, self._float32(gallery).T
        lengths = self._gallery_DG.norm(dim=0).double()
        self._longest = lengths.max()
        # Reused, because allocating memory for every block would take a third as long as the product itself
        self._scores = self._gallery_DG.new_empty(0, 0)
        self._squares = (self._gallery_DG.double().square().sum(0)).float() if distance == "euclidean" else None

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
