"""The score of a query and a gallery item, higher is nearer: exactly for chosen pairs, and quickly, within a bound, for all.

Exact scores are computed in float64, which has 53 binary digits, and rounded to 34 of them: what differs by the order of
additions alone becomes equal. Integers are not changed.

Q queries, G gallery items, P pairs, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.errors import UserError

Distance = Literal["cosine", "euclidean", "inner_product"]
DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean", "inner_product")

_GRID = 2.0**-34


@dataclass(frozen=True)
class Rows:
    """Embeddings that are ready to be compared under one distance.

    Attributes:
        values: [N, D] float32 or float64, of moderate size: divided by a power of two, which rounds nothing.
        divisor: [N] float64, by which inner products are divided: the length under cosine, else 1.
        grid: [N] float64: a product of two rows is rounded to a multiple of `2^-34 grid_q grid_g`.
    """

    values: Tensor
    divisor: Tensor
    grid: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.values[index], self.divisor[index], self.grid[index])


def check_distance(distance: str) -> None:
    """Raises `UserError` for a distance that does not exist."""
    if distance not in DISTANCES:
        raise UserError(f"distance must be one of {', '.join(DISTANCES)}, got '{distance}'")


def prepare_rows(queries: Tensor, gallery: Tensor, distance: Distance) -> tuple[Rows, Rows]:
    """Queries [Q, D] and gallery [G, D], all finite, prepared for the distance, with the same ranking.

    Raises:
        UserError: a row is zero under "cosine", or there is no such distance.
    """
    check_distance(distance)
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if distance == "cosine" and bool((rows == 0).all(1).any()):
            raise UserError(
                f"{name} contain an all-zero embedding, which has no cosine; use distance='euclidean' or 'inner_product'"
            )
    queries, gallery = _floating(queries), _floating(gallery)
    if distance == "cosine":
        return _by_length(queries), _by_length(gallery)
    scales = _power_below(queries.abs().amax()), _power_below(gallery.abs().amax())
    if distance == "euclidean":
        scales = (torch.maximum(*scales),) * 2
    return _scaled(queries, scales[0]), _scaled(gallery, scales[1])


def exact_scores(queries: Rows, gallery: Rows, distance: Distance) -> Tensor:
    """All scores [..., Q, G] in float64 of rows [..., Q, D] and [..., G, D]."""
    one, other = queries.values.double(), gallery.values.double()
    if distance == "euclidean":
        distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
        return -_to_34_digits(distances.square())
    divisor = queries.divisor.unsqueeze(-1) * gallery.divisor.unsqueeze(-2)
    grid = queries.grid.unsqueeze(-1) * gallery.grid.unsqueeze(-2)
    return _to_grid(one @ other.mT / divisor, grid)


class PairScores:
    """`exact_scores` of chosen pairs on the CPU, without torch's threads: for use inside others."""

    def __init__(self, queries: Rows, gallery: Rows, distance: Distance) -> None:
        self._queries, self._gallery = (
            (rows.values.numpy(), rows.divisor.numpy(), rows.grid.numpy()) for rows in (queries, gallery)
        )
        self._distance = distance

    def __call__(self, query_index: NDArray[np.intp], gallery_index: NDArray[np.intp]) -> NDArray[np.float64]:
        """The scores [P] of queries and gallery items at the given positions [P] each."""
        one, one_divisor, one_grid = (array[query_index] for array in self._queries)
        other, other_divisor, other_grid = (array[gallery_index] for array in self._gallery)
        one, other = one.astype(np.float64), other.astype(np.float64)
        scores: NDArray[np.float64]
        if self._distance == "euclidean":
            difference = one - other
            scores = -_to_34_digits(np.sqrt(np.einsum("pd,pd->p", difference, difference)) ** 2)
        else:
            scores = _to_grid(np.einsum("pd,pd->p", one, other) / (one_divisor * other_divisor), one_grid * other_grid)
        return scores


class QuickScores:
    """Scores in float32 by one matrix product, and how far they may be from the exact ones.

    Under "euclidean" they are `2 q.g - |g|^2`: the exact score and `|q|^2` (`offset`), which ranks alike.
    """

    def __init__(self, queries: Rows, gallery: Rows, distance: Distance) -> None:
        self._centre = gallery.values.mean(0) if distance == "euclidean" else None
        self._queries, self._gallery_DG = queries, self._float32(gallery).T
        lengths = self._gallery_DG.norm(dim=0).double()
        self._longest = lengths.max()
        self._scores = self._gallery_DG.new_empty(
            0, 0
        )  # new memory for every block would cost as much as a third of the product
        self._squares = (self._gallery_DG.double().square().sum(0)).float() if distance == "euclidean" else None

    def __call__(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For queries at `block` [B]: scores [B, G] float32; what they exceed exact scores by, offset [B], up to an error [B].

        The scores are overwritten by the next call.

        A sum of D products in float32, in any order, is off by less than `D u |q| |g|`, u = 2^-24; 16 u more are for rounding
        the rows and whatever is compared with the scores.
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
        if self._centre is not None:  # the same distances, and float32 keeps more of their digits
            return (rows.values - self._centre).float()
        return (rows.values / rows.divisor.unsqueeze(1).to(rows.values.dtype)).float()


def _floating(rows: Tensor) -> Tensor:
    """At least float32; integers as float64, which holds them."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32) if rows.is_floating_point() else torch.float64)


def _by_length(rows: Tensor) -> Rows:
    values, lengths = _moderate(rows)
    return Rows(values, lengths, torch.ones_like(lengths))


def _scaled(rows: Tensor, scale: Tensor) -> Rows:
    values = rows / scale.to(rows.dtype)
    _, lengths = _moderate(values)
    return Rows(values, torch.ones_like(lengths), _power_below(lengths) * _power_below(values.abs().amax(1)))


def _moderate(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over a power of two, so that no square overflows or vanishes, and its length then."""
    values = rows / _power_below(rows.abs().amax(1, keepdim=True)).to(rows.dtype)
    return values, torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)


def _power_below(sizes: Tensor) -> Tensor:
    """The power of two at or below each size >= 0, in float64; 1 for zero."""
    sizes = sizes.double()
    return torch.where(sizes > 0, torch.exp2(torch.floor(torch.log2(sizes))), 1.0)


def _to_grid(products: Any, grid: Any) -> Any:
    """Tensor or array: rounded to multiples of `2^-34 grid`."""
    step = grid * _GRID
    step = step + (step == 0)  # of rows so short that their product vanishes
    return (products / step).round() * step


def _to_34_digits(squared: Any) -> Any:
    """Tensor or array: rounded to 34 significant binary digits (Veltkamp's splitting)."""
    shifted = squared * (2.0**19 + 1)
    return shifted - (shifted - squared)
