"""Sums of absolute matrix products by compiled code (`absolute_products.c`), where installing the package could build it.

N samples, L positions, O outputs, P entries of a patch.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_embed.importance.rules.memory import scratch

NUM_TASKS = 16  # at least, if there are as many samples: enough for the threads of a large processor to share


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("delta", "input", "positions", "columns", "totals")),
        *((name, ctypes.c_int64) for name in ("num_samples", "num_outputs", "num_positions", "num_columns")),
        *((name, ctypes.c_int64) for name in ("sample_stride", "num_parts")),
        *((name, ctypes.c_int) for name in ("exponent", "num_threads")),
    )


def has_compiled_products() -> bool:
    """Whether this installation has the compiled code."""
    return _library() is not None


def can_compute(tensor: Tensor) -> bool:
    """Whether the compiled code takes such a tensor: float32 in main memory."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and has_compiled_products()


def sum_absolute_products(delta: Tensor, patches: Tensor, exponent: int) -> Tensor:
    """`sum_n |delta_n patches_n|^exponent` [O, P], where no `delta_n patches_n` is ever in memory.

    Args:
        delta: [N, O, *positions], float32.
        patches: a view [N, *positions, *entries] of float32, read in place; patches may overlap, but every entry of a patch
            must lie behind the one before it.
        exponent: 1 or 2.
    """
    library = _library()
    assert library is not None
    delta_NOL, last = delta.flatten(2), delta.ndim - 1
    num_samples, num_outputs, num_positions = delta_NOL.shape
    positions = _offsets(patches.shape[1:last], patches.stride()[1:last])
    columns = _offsets(patches.shape[last:], patches.stride()[last:])
    rows = ctypes.c_int.in_dll(library, "rows").value
    whole_NOL = F.pad(delta_NOL, (0, 0, 0, -num_outputs % rows)) if num_outputs % rows else delta_NOL
    grouped = whole_NOL.unflatten(1, (-1, rows)).permute(1, 0, 3, 2)
    packed = scratch("packed", grouped.shape, grouped).copy_(grouped)
    vector = _vector_width(library)
    num_parts = min(num_samples, max(1, 2 * vector * NUM_TASKS // len(columns)))
    totals = scratch("totals", (num_parts, num_outputs, len(columns)), delta_NOL).zero_()
    task = _Task(
        *(tensor.data_ptr() for tensor in (packed, patches, positions, columns, totals)),
        *(num_samples, num_outputs, num_positions, len(columns), patches.stride(0), num_parts),
        *(exponent, torch.get_num_threads()),
    )
    if library.add_absolute_products(ctypes.byref(task), vector):
        raise MemoryError
    return totals[0] if num_parts == 1 else totals.sum(0)


def _offsets(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Where the entries of a view lie, in its order, counted from the first."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return offsets


def _vector_width(library: ctypes.CDLL) -> int:
    return int(library.vector_width())


@cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("mas_embed.importance.rules._absolute_products")
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # PyTorch brings no OpenMP that the code knows
        return None
