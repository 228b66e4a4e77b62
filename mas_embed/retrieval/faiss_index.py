"""Functions on FAISS indexes: creation, training size, devices, files, and conversion of errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mas_embed.errors import UserError
from mas_embed.retrieval.search import import_faiss
from mas_embed.retrieval.similarity import Distance, check_distance


def empty_index(size: int, factory: str, distance: Distance) -> Any:
    """A FAISS index for vectors of `size` dimensions, without vectors, on the CPU.

    Raises:
        UserError: the distance does not exist, or FAISS cannot create such an index.
    """
    check_distance(distance)
    faiss = import_faiss()
    metric = faiss.METRIC_L2 if distance == "euclidean" else faiss.METRIC_INNER_PRODUCT
    with faiss_errors_as_user_errors(f"FAISS cannot make an index '{factory}' for {distance} of {size} dimensions"):
        return faiss.index_factory(size, factory, metric)


def min_training_size(index: Any) -> int:
    """The least number of rows that training needs, for k-means one for each list or code, for PCA one for each dimension."""
    index = import_faiss().downcast_index(index)
    chain = getattr(index, "chain", None)
    transforms = [chain.at(position) for position in range(chain.size())] if chain is not None else []
    inner_indexes = [getattr(index, name) for name in ("index", "base_index") if hasattr(index, name)]
    return max(
        1,
        getattr(index, "nlist", 0),
        getattr(getattr(index, "pq", None), "ksub", 0),
        *(transform.d_out for transform in transforms if not transform.is_trained),
        *map(min_training_size, inner_indexes),
    )


def index_on_device(index: Any, device: torch.device) -> Any:
    """A copy of the index on another device.

    Raises:
        UserError: FAISS cannot use the device, or has no GPU version of such an index.
    """
    faiss = import_faiss()
    supports_gpus = hasattr(faiss, "StandardGpuResources")
    if supports_gpus and isinstance(index, faiss.GpuIndex):
        index = faiss.index_gpu_to_cpu(index)
    if device.type == "cpu":
        return index
    num_gpus, gpu = faiss.get_num_gpus() if supports_gpus else 0, device.index or 0
    if device.type != "cuda" or gpu >= num_gpus:
        raise UserError(f"FAISS sees {num_gpus} GPUs here, so an index cannot be on '{device}'; use device='cpu'")
    with faiss_errors_as_user_errors(f"FAISS cannot put an {type(index).__name__} on a GPU"):
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)


def write_index(index: Any, path: Path) -> None:
    """Writes the index in FAISS's file format, and waits until it is on the disk."""
    import_faiss().write_index(index, str(path))
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_index(path: Path, *, memory_map: bool) -> Any:
    """The index in a file that `write_index` wrote, read into memory or, with `memory_map`, mapped.

    Raises:
        UserError: the file does not exist, or is damaged.
    """
    faiss = import_faiss()
    if not path.is_file():
        raise UserError(f"the vectors of the index are missing: there is no file {path}")
    with faiss_errors_as_user_errors(f"cannot read {path} as a FAISS index"):
        # IO_FLAG_MMAP, without _IFC, would map only the inverted lists of "IVF" indexes
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)


@contextmanager
def faiss_errors_as_user_errors(failure: str) -> Iterator[None]:
    """Raises FAISS's errors as `UserError`, with the given description and without the position in FAISS's source."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^Error in .*?\.(cpp|h|cu|cuh):\d+: ", "", str(error), flags=re.DOTALL).strip()
        raise UserError(f"{failure}: {reason}") from None
