"""Sums of absolute matrix products, computed by the C code in `absolute_products.c`.

The C code is optional: it is compiled when the package is installed, if there is a C compiler. N samples, L positions,
O outputs, P entries of a patch.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_embed.importance.rules.memory import scratch

MIN_TASKS = 16  # unless there are fewer samples; enough to keep the threads of a large processor busy


class _Task(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("delta", "input", "positions", "columns", "totals")),
        *((name, ctypes.c_int64) for name in ("num_samples", "num_outputs", "num_positions", "num_columns")),
        *((name, ctypes.c_int64) for name in ("sample_stride", "num_parts")),
        *((name, ctypes.c_int) for name in ("exponent", "num_threads")),
    )


def has_compiled_products() -> bool:
    """Whether the compiled code is part of this installation and can be loaded."""
    return _library() is not None


def can_compute(tensor: Tensor) -> bool:
    """Whether the compiled code is available and accepts this tensor, which must be float32 on the CPU."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and has_compiled_products()


def sum_absolute_products(delta: Tensor, patches: Tensor, exponent: int) -> Tensor:
    """`sum_n |delta_n patches_n|^exponent` [O, P], computed without storing any product `delta_n patches_n`.

    Args:
        delta: [N, O, *positions], in float32.
        patches: [N, *positions, *entries], in float32, read without a copy. It may be a view in which patches overlap, but
            the entries of a patch must be in increasing order in memory.
        exponent: 1 or 2.

    Raises:
        MemoryError: the compiled code could not allocate its buffers.
    """
    library = _library()
    assert library is not None
    delta_NOL, last = delta.flatten(2), delta.ndim - 1
    num_samples, num_outputs, num_positions = delta_NOL.shape
    positions = _offsets(patches.shape[1:last], patches.stride()[1:last])
    columns = _offsets(patches.shape[last:], patches.stride()[last:])
    rows = ctypes.c_int.in_dll(library, "rows").value
    padded_NOL = F.pad(delta_NOL, (0, 0, 0, -num_outputs % rows)) if num_outputs % rows else delta_NOL
    grouped = padded_NOL.unflatten(1, (-1, rows)).permute(1, 0, 3, 2)
    packed = scratch("packed", grouped.shape, grouped).copy_(grouped)
    vector = _vector_width(library)
    num_parts = min(num_samples, max(1, 2 * vector * MIN_TASKS // len(columns)))
    totals = scratch("totals", (num_parts, num_outputs, len(columns)), delta_NOL).zero_()
    task = _Task(
        *(tensor.data_ptr() for tensor in (packed, patches, positions, columns, totals)),
        *(num_samples, num_outputs, num_positions, len(columns), patches.stride(0), num_parts),
        *(exponent, torch.get_num_threads()),
    )
    if library.add_absolute_products(ctypes.byref(task), vector):
        raise MemoryError
    return totals[0] if num_parts == 1 else totals.sum(0)


@lru_cache(maxsize=256)  # a network repeats few shapes
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The offsets in memory of the entries of a view from its first entry, in the order of the view."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(shape, strides, strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return offsets


def _vector_width(library: ctypes.CDLL) -> int:
    return int(library.vector_width())


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("mas_embed.importance.rules._absolute_products")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # PyTorch did not load an OpenMP library that has the functions the code calls
        return None
