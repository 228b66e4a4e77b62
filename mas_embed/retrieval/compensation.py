"""Old embeddings moved to where a new model would put them, without embedding their items again.

Every estimator is fitted on items that both models embedded (those of the new split, say), and then moves the vectors of a
gallery that only the old model embedded. Arithmetic is in float64; results have the dtype and device of the gallery.

M items to fit on, G gallery items, B gallery items of a block, D embedding size.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.retrieval.inputs import as_embeddings

COMPENSATIONS = Registry("compensation")
BLOCK_ELEMENTS = 2**22
TOWARDS_IDENTITY = 1e-10  # of the largest singular value: it decides only directions that the data leave open


class Compensation(Protocol):
    """What moves old embeddings into the space of a new model."""

    def fit(self, old: Tensor, new: Tensor) -> Self:
        """Learns from the same items, row by row, in the old and the new space, [M, D] each; returns itself."""
        ...

    def transform(self, gallery: Tensor) -> Tensor:
        """The gallery [G, D] of the old space as the new model might have embedded it, [G, D]."""
        ...


@COMPENSATIONS.register("drift")
class DriftCompensation:
    """Adds to each old vector the drift seen near it: a mean of the fitted items' drifts, weighted by closeness.

    `g + sum_i w_i (new_i - old_i) / sum_i w_i`, `w_i = exp(-|old_i - g|^2 / (2 sigma^2))`. The weights are a softmax, so they
    cannot all underflow: a vector far from every fitted item takes the drift of the nearest one.

    Args:
        sigma: > 0, a distance in the embedding space; the paper's 0.3 is meant for vectors of length 1.

    Raises:
        UserError: `sigma` is not positive; on use, embeddings that do not fit each other, or `transform` before `fit`.

    O(G M D) time; blocks of about 4 million weights in memory.

    Source: Yu, Twardowski, Liu, Herranz, Wang, Cheng, Jui, van de Weijer, *Semantic Drift Compensation for Class-Incremental
        Learning*, CVPR 2020. There it moves class means; here every vector of a gallery.

    Example:
        >>> shifted = DriftCompensation().fit(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]]))
        >>> shifted.transform(torch.tensor([[1.0, 0.0]]))
        tensor([[1.5000, 0.0000]])
    """

    def __init__(self, sigma: float = 0.3) -> None:
        if not sigma > 0:
            raise UserError(f"sigma must be positive, got {sigma}")
        self.sigma = sigma
        self._old: Tensor | None = None
        self._drift: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        self._old, moved = _pair(old, new)
        self._drift = moved - self._old
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, old, drift = _to_transform(gallery, self._old, self._drift)
        return torch.cat([_drifted(block, old, drift, self.sigma) for block in rows.split(_block_size(old))]).to(
            gallery
        )


@COMPENSATIONS.register("procrustes")
class ProcrustesCompensation:
    """Turns the old space onto the new one: the orthogonal Q that minimises `|old Q - new|^2` (Frobenius norm).

    Lengths, distances and cosines within the gallery stay what they are. Directions that the fitted items leave open (all
    items in a subspace, or M < D) are turned as little as possible.

    Raises:
        UserError: embeddings that do not fit each other, or `transform` before `fit`.

    O(M D^2 + D^3) to fit, O(G D^2) to transform.

    Source: Schönemann, *A generalized solution of the orthogonal Procrustes problem*, Psychometrika 1966: `Q = U V^T` of the
        singular value decomposition `old^T new = U S V^T`. We add 1e-10 of the largest singular value to the diagonal of
        `old^T new`, which settles the open directions.

    Example:
        >>> turn = ProcrustesCompensation().fit(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        >>> turn.transform(torch.tensor([[2.0, 0.0]])).round(decimals=4)
        tensor([[0., 2.]])
    """

    def __init__(self) -> None:
        self._turn: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        before, after = _pair(old, new)
        together = before.mT @ after
        # argmin |old Q - new|^2 + c |Q - I|^2 = argmax <old^T new + c I, Q>
        together.diagonal().add_(TOWARDS_IDENTITY * torch.linalg.matrix_norm(together, 2))
        left, _, right = torch.linalg.svd(together)
        self._turn = left @ right
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, turn = _to_transform(gallery, self._turn)
        return (rows @ turn).to(gallery)


@COMPENSATIONS.register("ridge")
class RidgeCompensation:
    """Predicts an item's drift from its old vector by ridge regression with an intercept.

    `g + (g - m) A + b`, m the mean of the old vectors and b the mean drift; A minimises
    `|(old - m) A - (new - old - b)|^2 + regularisation t |A|^2`, t the mean over dimensions of the old vectors' summed squares
    around m, so the same value means the same for any M and scale. Where the fitted items tell nothing, A is 0 and vectors
    move by the mean drift alone.

    Args:
        regularisation: > 0; about the relative variance below which a direction counts as noise.

    Raises:
        UserError: `regularisation` is not positive; on use, embeddings that do not fit each other, or `transform` before `fit`.

    O(M D^2 + D^3) to fit, O(G D^2) to transform.

    Source: Hoerl and Kennard, *Ridge Regression*, Technometrics 1970. That the drift is regressed, not the new vector, is ours.

    Example:
        >>> linear = RidgeCompensation(1e-9).fit(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
        >>> linear.transform(torch.tensor([[2.0]]))
        tensor([[5.]])
    """

    def __init__(self, regularisation: float = 1e-3) -> None:
        if not regularisation > 0:
            raise UserError(f"regularisation must be positive, got {regularisation}")
        self.regularisation = regularisation
        self._mean: Tensor | None = None
        self._drift: Tensor | None = None
        self._slope: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        before, after = _pair(old, new)
        self._mean, self._drift = before.mean(0), (after - before).mean(0)
        centred, target = before - self._mean, after - before - self._drift
        squares = centred.mT @ centred
        scale = squares.diagonal().mean()
        # With one distinct item nothing is left to regress: any positive scale gives A = 0
        squares.diagonal().add_(self.regularisation * torch.where(scale > 0, scale, 1.0))
        self._slope = torch.linalg.solve(squares, centred.mT @ target, left=True)
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, mean, drift, slope = _to_transform(gallery, self._mean, self._drift, self._slope)
        return (rows + (rows - mean) @ slope + drift).to(gallery)


def _drifted(rows: Tensor, old: Tensor, drift: Tensor, sigma: float) -> Tensor:
    """[B, D]."""
    weights_BM = torch.softmax(-torch.cdist(rows, old).square() / (2 * sigma**2), dim=1)
    return rows + weights_BM @ drift


def _block_size(old: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // len(old))


def _pair(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    before, after = as_embeddings(old, "old"), as_embeddings(new, "new")
    if before.shape != after.shape:
        raise UserError(
            f"old and new must embed the same items in one size, got {list(before.shape)} and {list(after.shape)}"
        )
    return before.double(), after.double()


def _to_transform(gallery: Tensor, *fitted: Tensor | None) -> tuple[Tensor, ...]:
    """The gallery in float64, and what was fitted, on its device."""
    found = [tensor.to(gallery.device) for tensor in fitted if tensor is not None]
    if len(found) < len(fitted):
        raise UserError("a compensation must be fitted before it transforms: call fit(old, new)")
    rows = as_embeddings(gallery, "gallery").double()
    if rows.shape[1] != found[0].shape[-1]:
        raise UserError(
            f"the gallery has {rows.shape[1]} dimensions, but the compensation was fitted on {found[0].shape[-1]}"
        )
    return rows, *found
