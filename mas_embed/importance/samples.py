"""Divides batches into samples: the rows of tensors, lists of texts, and tokens that are concatenated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.forward import input_of, is_texts, map_leaves, map_tensors


def split_samples(batch: Any, num_samples: int) -> tuple[list[Tensor], Any]:
    """The tensors of a batch whose first dimension is `num_samples`, and a function that rebuilds the batch from such a list."""
    tensors: list[Tensor] = []

    def is_per_sample(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == num_samples

    def collect(tensor: Tensor) -> Tensor:
        if is_per_sample(tensor):
            tensors.append(tensor)
        return tensor

    map_tensors(collect, batch)

    def rebuild(replacements: list[Tensor]) -> Any:
        remaining = iter(replacements)
        return map_tensors(lambda tensor: next(remaining) if is_per_sample(tensor) else tensor, batch)

    return tensors, rebuild


def take_samples(batch: Any, num_samples: int, indices: list[int]) -> Any:
    """The batch reduced to the samples at `indices`, in that order; every part with `num_samples` samples is reduced."""

    def take(part: Any) -> Any:
        is_scalar = isinstance(part, Tensor) and part.ndim == 0
        if is_scalar or num_samples_of(part) != num_samples:
            return part
        if is_texts(part):
            return type(part)(part[index] for index in indices)
        return _take_concatenated(part, indices) if isinstance(part, Mapping) else part[indices]

    return map_leaves(take, batch, _is_leaf)


def has_only_rows(batch: Any) -> bool:
    """Whether every sample is a row of tensors, as `split_samples` requires, and not a text or a part of concatenated tokens."""
    is_row: list[bool] = []

    def check(part: Any) -> Any:
        is_row.append(isinstance(part, Tensor))
        return part

    map_leaves(check, batch, _is_leaf)
    return all(is_row)


def num_samples_of(batch: Any) -> int:
    """The number of texts, of offsets, or the size of the first dimension of the first tensor in the input of a batch."""
    sizes: list[int] = []

    def append_size(part: Any) -> Any:
        tensor = part["offsets"] if isinstance(part, Mapping) else part
        sizes.append(1 if isinstance(tensor, Tensor) and tensor.ndim == 0 else len(tensor))
        return part

    map_leaves(append_size, input_of(batch), _is_leaf)
    if not sizes:
        raise UserError("a batch must be a list of texts, or contain a tensor with the samples in its first dimension")
    return sizes[0]


def _is_leaf(part: Any) -> bool:
    return isinstance(part, Tensor) or is_texts(part) or _is_concatenated(part)


def _is_concatenated(part: Any) -> bool:
    """Whether the part holds the tokens of all samples in one dimension, with the offset of each, as `EmbeddingBag` reads it."""
    if not isinstance(part, Mapping):
        return False
    tokens, offsets = part.get("input_ids"), part.get("offsets")
    return isinstance(tokens, Tensor) and isinstance(offsets, Tensor) and tokens.ndim == offsets.ndim == 1


def _take_concatenated(part: Mapping[str, Any], indices: list[int]) -> dict[str, Any]:
    """The tokens of the samples at `indices`, concatenated, and their new offsets."""
    tokens, ends = part["input_ids"], [*part["offsets"][1:].tolist(), len(part["input_ids"])]
    starts = part["offsets"].tolist()
    taken = [tokens[starts[index] : ends[index]] for index in indices]
    lengths = torch.tensor([0, *(len(sample) for sample in taken[:-1])], device=tokens.device)
    return {**part, "input_ids": torch.cat(taken), "offsets": lengths.cumsum(0)}
