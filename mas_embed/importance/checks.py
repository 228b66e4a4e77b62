"""Checks of the arguments, the embeddings and the gradients of an importance estimate; each one raises `UserError`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mas_embed.errors import UserError
from mas_embed.importance.outputs import Output, SquaredNorm
from mas_embed.runtime.checks import shown
from mas_embed.runtime.forward import check_batches
from mas_embed.runtime.sharding import is_sharded

# How much rounding alone may change an embedding, relative to its deviation from the mean and relative to its norm
_ROUNDING = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-3, 1e-5)}
_TENSOR_FLOAT_ROUNDING = (5e-2, 5e-3)  # float32 on a GPU, where torch lets convolutions compute in TF32, with 11 digits
_HALF_PRECISION_ROUNDING = (1e-1, 2e-2)

_CONSTANT_NORM = (
    "output='squared_norm' is constant for embeddings of {length} length, so the importance of every parameter would be "
    "zero; use output='projection', which measures the change of their direction, or pass embed=... to take the "
    "embeddings before they are normalized (of a SentenceTransformer: embed='sentence_transformers_unnormalized')"
)


def check_arguments(model: nn.Module, batches: Iterable[Any], granularity: str, exponent: int) -> None:
    """Raises `UserError` if `estimate_importance` does not accept one of these arguments."""
    check_batches(batches)
    if not isinstance(granularity, str) or granularity not in ("sample", "batch"):
        raise UserError(f"granularity must be 'sample' or 'batch', got {shown(granularity)}")
    if type(exponent) is not int or exponent not in (1, 2):
        raise UserError(f"exponent must be 1 (MAS) or 2 (squared gradient), got {shown(exponent)}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UserError(f"parameter '{name}' has no shape yet; run the model once on a batch first")
        if is_sharded(parameter):
            raise UserError(
                f"parameter '{name}' is sharded over processes, so no process has the gradients of whole samples; estimate "
                "importance before fully_shard(model), and load the state of the method into one of the sharded model"
            )
        if parameter.is_complex():
            raise UserError(f"parameter '{name}' is complex; importance is defined for real parameters")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the model has no trainable parameter; set requires_grad=True on the ones that will be trained")


def check_embeddings(embeddings: Tensor, output: Output) -> None:
    """Raises `UserError` if the embeddings [N, D] are empty, not finite, or of unit norm while the output is that norm."""
    if len(embeddings) == 0:
        raise UserError("the batch is empty")
    if not embeddings.is_floating_point():
        raise UserError(f"embeddings must be real floating-point numbers, got {embeddings.dtype}")
    if not bool(embeddings.isfinite().all()):
        raise UserError("the embeddings contain NaN or infinite values; check the inputs and the weights for them")
    if isinstance(output, SquaredNorm):
        tolerance = 1e-5 if embeddings.dtype in (torch.float32, torch.float64) else 1e-2
        if bool(((embeddings.detach().norm(dim=1) - 1).abs() < tolerance).all()):
            raise UserError(_CONSTANT_NORM.format(length="unit"))


def check_num_samples(num_samples: int) -> None:
    """Raises `UserError` if the number of samples, summed over all processes, is zero."""
    if num_samples == 0:
        raise UserError(
            "batches is empty: importance needs at least one batch of inputs (an iterator can be read only once)"
        )


def check_sums_are_finite(sums: Mapping[str, Tensor]) -> None:
    """Raises `UserError` that names the parameters whose gradient is NaN or infinite for at least one sample."""
    largest = {name: total.max().double() for name, total in sums.items() if total.numel()}  # max propagates NaN
    values = torch.stack(list(largest.values())).tolist() if largest else []  # a GPU is waited for once
    names = [name for name, value in zip(largest, values, strict=True) if not math.isfinite(value)]
    if names:
        raise UserError(
            f"the gradient of {', '.join(names)} is NaN or infinite for at least one sample whose embedding is finite; "
            "check the model for a function that has no derivative at its input, such as sqrt at zero"
        )


def check_norm_can_change(norms: Tensor, importance: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises `UserError` if the embeddings have the same norm for all samples [N] and no parameter can change it.

    If a network is free to scale its output, `sum_p |theta_p d||F||^2 / d theta_p|` is about `2 ||F||^2` or more.
    """
    largest = norms.max()
    if len(norms) > 1 and bool(largest - norms.min() <= 1e-5 * largest):
        parameters = dict(model.named_parameters())
        sensitivity = sum((importance[name] * parameters[name].detach().abs()).sum() for name in importance)
        if bool(sensitivity < 1e-3 * largest.square()):
            raise UserError(_CONSTANT_NORM.format(length="constant"))


def check_samples_are_independent(alone: Tensor, in_batch: Tensor, indices: list[int]) -> None:
    """Raises `UserError` if samples have other embeddings in the batch than without the rest of the batch.

    Args:
        alone: [len(indices), D], the embeddings of the samples at `indices`, computed without the other samples.
        in_batch: [N, D], the embeddings of the whole batch.
        indices: the positions of these samples in the batch.
    """
    rounding = _ROUNDING.get(in_batch.dtype, _HALF_PRECISION_ROUNDING)
    is_tensor_float = in_batch.is_cuda and in_batch.dtype == torch.float32
    relative_to_deviation, relative_to_norm = _TENSOR_FLOAT_ROUNDING if is_tensor_float else rounding
    expected = in_batch[indices]
    largest_deviation = (in_batch - in_batch.mean(0)).norm(dim=1).max()
    tolerance = relative_to_deviation * largest_deviation + relative_to_norm * in_batch.norm(dim=1).max()
    if alone.shape != expected.shape or bool(((alone - expected).norm(dim=1) > tolerance).any()):
        raise UserError(
            "a sample's embedding changes with the other samples of its batch, so its gradient is not defined; put the "
            "samples in the first dimension of every tensor, and remove layers that use the statistics of the batch"
        )
