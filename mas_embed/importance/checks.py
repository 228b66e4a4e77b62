"""What importance cannot be computed of, told before it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mas_embed.errors import UserError
from mas_embed.importance.outputs import Output, SquaredNorm

# How much embeddings may change by rounding alone: relative to their deviation from the mean, and to their length
_ROUNDING = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-3, 1e-5)}
_HALF_ROUNDING = (1e-1, 2e-2)

_CONSTANT_LENGTH = (
    "output='squared_norm' on embeddings of {length} length is constant, so its importance is zero everywhere: take "
    "output='projection' (what moves the direction), or pass embed=... to embed before the normalisation"
)


def check_arguments(model: nn.Module, batches: Iterable[Any], granularity: str, exponent: int) -> None:
    """Raises `UserError` for arguments of `estimate_importance` that it does not take."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise UserError(f"batches must be an iterable of batches, got one {kind}; pass [batch], or a DataLoader")
    if granularity not in ("sample", "batch"):
        raise UserError(f"granularity must be 'sample' or 'batch', got {granularity!r}")
    if exponent not in (1, 2):
        raise UserError(f"exponent must be 1 (MAS) or 2 (squared gradient), got {exponent!r}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UserError(f"parameter '{name}' has no shape yet; run the model once on a batch first")
        if parameter.is_complex():
            raise UserError(f"parameter '{name}' is complex; importance is defined for real parameters")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no trainable parameter; importance of what never changes is not needed")


def check_embeddings(embeddings: Tensor, output: Output) -> None:
    """Raises `UserError` for embeddings [N, D] that are none, not finite, or of unit length under "squared_norm"."""
    if len(embeddings) == 0:
        raise UserError("the batch is empty")
    if not bool(embeddings.isfinite().all()):
        raise UserError("the embeddings contain NaN or infinite values; look for them in the inputs or the weights")
    if isinstance(output, SquaredNorm):
        tolerance = 1e-5 if embeddings.dtype in (torch.float32, torch.float64) else 1e-2
        if bool(((embeddings.detach().norm(dim=1) - 1).abs() < tolerance).all()):
            raise UserError(_CONSTANT_LENGTH.format(length="unit"))


def check_num_samples(num_samples: int) -> None:
    """Raises `UserError` if no process had a sample."""
    if num_samples == 0:
        raise UserError(
            "batches is empty: importance needs at least one batch of inputs (an iterator is read only once)"
        )


def check_finite(sums: Mapping[str, Tensor]) -> None:
    """Raises `UserError` naming the parameters whose gradients were not finite for some sample."""
    largest = {name: total.max() for name, total in sums.items() if total.numel()}  # NaN passes through max
    names = [name for name, value in largest.items() if not math.isfinite(value)]
    if names:
        raise UserError(
            f"the gradient of {', '.join(names)} is NaN or infinite for some sample, though its embedding is not; look for "
            "a function without a derivative there, such as sqrt at zero"
        )


def check_length_varies(lengths: Tensor, importance: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises `UserError` if all embeddings have one length [N], other than one, that no parameter can change.

    Where a network is free to scale its output, `sum_p |theta_p d||F||^2 / d theta_p|` is about `2 ||F||^2` or more.
    """
    longest = lengths.max()
    if len(lengths) > 1 and bool(longest - lengths.min() <= 1e-5 * longest):
        own = dict(model.named_parameters())
        sensitivity = sum((importance[name] * own[name].detach().abs()).sum() for name in importance)
        if bool(sensitivity < 1e-3 * longest.square()):
            raise UserError(_CONSTANT_LENGTH.format(length="constant"))


def check_samples_are_independent(alone: Tensor, in_batch: Tensor, indices: list[int]) -> None:
    """Raises `UserError` if some rows of the batch [N, D] are not what their samples give without the others."""
    spread, length = _ROUNDING.get(in_batch.dtype, _HALF_ROUNDING)
    expected = in_batch[indices]
    tolerance = spread * (in_batch - in_batch.mean(0)).norm(dim=1).max() + length * in_batch.norm(dim=1).max()
    if alone.shape != expected.shape or bool(((alone - expected).norm(dim=1) > tolerance).any()):
        raise UserError(
            "a sample's embedding changes with the other samples of its batch, so it has no gradient of its own: batches "
            "must have the samples in their first dimension, and layers that use the batch's statistics must go"
        )
