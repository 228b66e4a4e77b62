"""Estimators that map embeddings of an old model into the embedding space of a new one, without embedding the items again.

Every estimator is fitted on items that both models embedded, such as those of the new split. It then transforms the vectors
of a gallery that only the old model embedded. Arithmetic is in float64; results have the dtype and device of the gallery.

M items that an estimator is fitted on, G gallery items, B gallery items in a block, D embedding size.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.runtime.checks import as_number

COMPENSATIONS = Registry("compensation")
BLOCK_ELEMENTS = 2**20  # weights in memory at once
# Relative to the largest singular value: so small that it matters only in directions that the data leave undetermined
IDENTITY_WEIGHT = 1e-10


class Compensation(Protocol):
    """Interface of an estimator that maps old embeddings into the embedding space of a new model."""

    def fit(self, old: Tensor, new: Tensor) -> Self:
        """Fits the map to the embeddings [M, D] of the same items, row by row, by both models; returns the estimator."""
        ...

    def transform(self, gallery: Tensor) -> Tensor:
        """An estimate [G, D] of how the new model would embed the items that the old model embedded as `gallery` [G, D]."""
        ...


@COMPENSATIONS.register("drift")
class DriftCompensation:
    """Adds to each old vector a weighted mean of the drifts of the fitted items, in which nearby items weigh more.

    A vector g becomes `g + sum_i w_i (new_i - old_i) / sum_i w_i` with `w_i = exp(-|old_i - g|^2 / (2 sigma^2))`. The
    normalised weights are computed as a softmax, so they cannot all underflow: a vector far from every fitted item takes the
    drift of the nearest one.

    Args:
        sigma: > 0, a distance in the embedding space. The paper's value, 0.3, is meant for vectors of unit length.

    Raises:
        UserError: `sigma` is not positive; `fit` or `transform` gets embeddings whose shapes do not match; or `transform` is
            called before `fit`.

    Takes O(G M D) time; at most about 1 million weights are in memory at once.

    Source: Yu, Twardowski, Liu, Herranz, Wang, Cheng, Jui, van de Weijer, *Semantic Drift Compensation for Class-Incremental
        Learning*, CVPR 2020, equations 10, 11 and 13. The paper moves class means; this class moves any vectors, such as class
        means or the vectors of a gallery.

    Examples:
        >>> shifted = DriftCompensation().fit(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]]))
        >>> shifted.transform(torch.tensor([[1.0, 0.0]]))
        tensor([[1.5000, 0.0000]])
    """

    def __init__(self, sigma: float = 0.3) -> None:
        if not as_number("sigma", sigma) > 0:
            raise UserError(f"sigma must be positive, got {sigma}")
        self.sigma = sigma
        self._old: Tensor | None = None
        self._drift: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        self._old, after = _as_float64_pair(old, new)
        self._drift = after - self._old
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, old, drift = _gallery_and_fitted(gallery, self._old, self._drift)
        moved, size = torch.empty_like(rows), _block_size(old)
        for block, moved_block in zip(rows.split(size), moved.split(size), strict=True):
            moved_block.copy_(_with_weighted_drift(block, old, drift, self.sigma))
        return moved.to(gallery)


@COMPENSATIONS.register("procrustes")
class ProcrustesCompensation:
    """Multiplies old vectors by the orthogonal matrix Q that minimises `|old Q - new|^2` (Frobenius norm).

    Lengths, distances and cosines within the gallery do not change. Where the fitted items do not determine Q (because they
    lie in a subspace, or M < D), Q is as close to the identity as possible.

    Raises:
        UserError: `fit` or `transform` gets embeddings whose shapes do not match, or `transform` is called before `fit`.

    `fit` takes O(M D^2 + D^3) and `transform` O(G D^2).

    Source: Schönemann, *A generalized solution of the orthogonal Procrustes problem*, Psychometrika 1966: `Q = U V^T` of the
        singular value decomposition `old^T new = U S V^T`. We add 1e-10 of the largest singular value to the diagonal of
        `old^T new`, which selects the Q closest to the identity if several are optimal.

    Examples:
        >>> rotation = ProcrustesCompensation().fit(torch.eye(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        >>> rotation.transform(torch.tensor([[2.0, 0.0]])).round(decimals=4)
        tensor([[0., 2.]])
    """

    def __init__(self) -> None:
        self._orthogonal: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        before, after = _as_float64_pair(old, new)
        products = before.mT @ after
        # argmin |old Q - new|^2 + c |Q - I|^2 = argmax <old^T new + c I, Q>
        products.diagonal().add_(IDENTITY_WEIGHT * torch.linalg.matrix_norm(products, 2))
        left, _, right = torch.linalg.svd(products)
        self._orthogonal = left @ right
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, orthogonal = _gallery_and_fitted(gallery, self._orthogonal)
        return (rows @ orthogonal).to(gallery)


@COMPENSATIONS.register("ridge")
class RidgeCompensation:
    """Adds to each old vector a drift that ridge regression with an intercept predicts from the vector.

    A vector g becomes `g + (g - m) A + b`, where m is the mean of the old vectors and b is the mean drift. A minimises
    `|(old - m) A - (new - old - b)|^2 + regularisation t |A|^2`. Here t is the sum over items of `(old - m)^2`, averaged over
    the D dimensions; this makes `regularisation` independent of M and of the scale of the vectors. In directions without
    variance among the fitted items A is 0, and vectors move by the mean drift alone.

    Args:
        regularisation: > 0. A direction whose variance is below about this fraction of the mean variance counts as noise.

    Raises:
        UserError: `regularisation` is not positive; `fit` or `transform` gets embeddings whose shapes do not match; or
            `transform` is called before `fit`.

    `fit` takes O(M D^2 + D^3) and `transform` O(G D^2).

    Source: Hoerl and Kennard, *Ridge Regression*, Technometrics 1970. Regressing the drift instead of the new vector is our
        choice.

    Examples:
        >>> linear = RidgeCompensation(1e-9).fit(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
        >>> linear.transform(torch.tensor([[2.0]]))
        tensor([[5.]])
    """

    def __init__(self, regularisation: float = 1e-3) -> None:
        if not as_number("regularisation", regularisation) > 0:
            raise UserError(f"regularisation must be positive, got {regularisation}")
        self.regularisation = regularisation
        self._mean: Tensor | None = None
        self._drift: Tensor | None = None
        self._slope: Tensor | None = None

    def fit(self, old: Tensor, new: Tensor) -> Self:
        before, after = _as_float64_pair(old, new)
        self._mean, self._drift = before.mean(0), (after - before).mean(0)
        centred, target = before - self._mean, after - before - self._drift
        squares = centred.mT @ centred
        scale = squares.diagonal().mean()
        # If all old vectors are equal, both sides of the system are zero, and any positive scale gives A = 0
        squares.diagonal().add_(self.regularisation * torch.where(scale > 0, scale, 1.0))
        self._slope = torch.linalg.solve(squares, centred.mT @ target, left=True)
        return self

    def transform(self, gallery: Tensor) -> Tensor:
        rows, mean, drift, slope = _gallery_and_fitted(gallery, self._mean, self._drift, self._slope)
        return (rows + (rows - mean) @ slope + drift).to(gallery)


def _with_weighted_drift(rows: Tensor, old: Tensor, drift: Tensor, sigma: float) -> Tensor:
    """The rows [B, D] of a block plus the weighted mean of the fitted items' drifts, [B, D]."""
    scaled_BM = torch.cdist(rows, old).square_().div_(-2 * sigma**2)
    return torch.softmax(scaled_BM, dim=1) @ drift + rows


def _block_size(old: Tensor) -> int:
    """The number of gallery rows whose weights for the fitted items `old` [M, D] are in memory at once."""
    return max(1, BLOCK_ELEMENTS // len(old))


def _as_float64_pair(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The old and the new embeddings [M, D] in float64; raises `UserError` if their shapes differ."""
    before, after = as_embeddings(old, "old"), as_embeddings(new, "new")
    if before.device != after.device:
        raise UserError(f"old is on {before.device} and new on {after.device}; move both to one device")
    if before.shape != after.shape:
        raise UserError(
            f"old and new must be embeddings of the same items, of equal size, got {list(before.shape)} and {list(after.shape)}"
        )
    return before.double(), after.double()


def _gallery_and_fitted(gallery: Tensor, *fitted: Tensor | None) -> tuple[Tensor, ...]:
    """The gallery in float64, followed by the fitted tensors on its device."""
    if not isinstance(gallery, Tensor) or not gallery.is_floating_point():
        got = gallery.dtype if isinstance(gallery, Tensor) else type(gallery).__name__
        raise UserError(f"the gallery must be a floating-point tensor, as the result has its dtype, got {got}")
    on_device = [tensor.to(gallery.device) for tensor in fitted if tensor is not None]
    if len(on_device) < len(fitted):
        raise UserError("a compensation must be fitted before it transforms: call fit(old, new)")
    rows = as_embeddings(gallery, "gallery").double()
    if rows.shape[1] != on_device[0].shape[-1]:
        raise UserError(
            f"the gallery has {rows.shape[1]} dimensions, but the compensation was fitted on {on_device[0].shape[-1]}"
        )
    return rows, *on_device
