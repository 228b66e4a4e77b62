"""Arrays and tensors that users pass, as tensors."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mas_embed.errors import UserError, reason_of


def as_tensor(values: ArrayLike | Tensor, name: str) -> Tensor:
    """The values as a tensor without gradients, which shares memory with `values` if possible; `name` is used in errors.

    Raises:
        UserError: the values are not numbers, rows differ in length, or a value is masked or not stored (a sparse tensor).
    """
    if isinstance(values, Tensor):
        is_8_bit = values.is_floating_point() and values.itemsize == 1  # torch cannot compute with these
        if values.layout != torch.strided or values.is_quantized or values.is_meta or is_8_bit:
            raise UserError(
                f"{name} must be a dense tensor of numbers, got {values.dtype} ({values.layout}) on {values.device}"
            )
        return values.detach()
    if isinstance(values, np.ma.MaskedArray):
        raise UserError(f"{name} must be an array without a mask, got a MaskedArray; leave out the masked items")
    try:
        array = np.asarray(values)
        with warnings.catch_warnings():
            # Arrays mapped from a file are often read-only; the package never writes into its inputs
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{name} must be an array of numbers: {reason_of(error)}") from None


def as_integers(values: ArrayLike | Tensor, name: str, num_items: int | None = None) -> Tensor:
    """The labels or ids [N] as an int64 tensor; `name` is used in errors.

    Args:
        values: [N] integers.
        name: the name of the argument.
        num_items: the number of embeddings, which N must equal; None: any N.

    Raises:
        UserError: the values are not integers of shape [N] (booleans are none), or are beyond int64; or N is not `num_items`.
    """
    numbers = as_tensor(values, name)
    is_integer = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.ndim != 1 or (len(numbers) and not is_integer):
        raise UserError(f"{name} must be integers of shape [N], got {numbers.dtype} of shape {list(numbers.shape)}")
    if num_items is not None and len(numbers) != num_items:
        raise UserError(f"there are {num_items} embeddings but {len(numbers)} {name}")
    integers = numbers.long()
    if numbers.dtype == torch.uint64 and bool((integers < 0).any()):
        raise UserError(f"{name} must be less than 2^63, the range of int64")
    return integers
