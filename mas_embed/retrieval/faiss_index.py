"""FAISS's side of an index: making, training sizes, devices, files, and errors that speak to the user."""

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


def empty_vectors(size: int, factory: str, distance: Distance) -> Any:
    """FAISS's index without vectors, on the CPU."""
    check_distance(distance)
    faiss = import_faiss()
    metric = faiss.METRIC_L2 if distance == "euclidean" else faiss.METRIC_INNER_PRODUCT
    with faiss_errors(f"FAISS cannot make an index '{factory}' for {distance} of {size} dimensions"):
        return faiss.index_factory(size, factory, metric)


def training_size_needed(vectors: Any) -> int:
    """How many rows the k-means and PCA in an index need at least: one for each list, code or dimension."""
    index = import_faiss().downcast_index(vectors)
    chain = getattr(index, "chain", None)
    steps = [chain.at(place) for place in range(chain.size())] if chain is not None else []
    inner = [getattr(index, name) for name in ("index", "base_index") if hasattr(index, name)]
    return max(
        1,
        getattr(index, "nlist", 0),
        getattr(getattr(index, "pq", None), "ksub", 0),
        *(step.d_out for step in steps if not step.is_trained),
        *map(training_size_needed, inner),
    )


def moved_vectors(vectors: Any, device: torch.device) -> Any:
    """A copy on another device."""
    faiss = import_faiss()
    has_gpus = hasattr(faiss, "StandardGpuResources")
    if has_gpus and isinstance(vectors, faiss.GpuIndex):
        vectors = faiss.index_gpu_to_cpu(vectors)
    if device.type == "cpu":
        return vectors
    num_gpus, number = faiss.get_num_gpus() if has_gpus else 0, device.index or 0
    if device.type != "cuda" or number >= num_gpus:
        raise UserError(f"FAISS sees {num_gpus} GPUs here, so an index cannot be on '{device}'; use device='cpu'")
    with faiss_errors(f"FAISS cannot put an {type(vectors).__name__} on a GPU"):
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, vectors)


def write_vectors(vectors: Any, path: Path) -> None:
    """Writes FAISS's own format, to disk and not only to its cache."""
    import_faiss().write_index(vectors, str(path))
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_vectors(path: Path, *, memory_map: bool) -> Any:
    """Reads what `write_vectors` wrote, or maps it."""
    faiss = import_faiss()
    if not path.is_file():
        raise UserError(f"the vectors of the index are missing: there is no file {path}")
    with faiss_errors(f"cannot read {path} as a FAISS index"):
        # The flag without _IFC maps the lists of "IVF" only
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)


@contextmanager
def faiss_errors(what_failed: str) -> Iterator[None]:
    """Turns FAISS's errors into one sentence, without the place in its source."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^Error in .*?\.(cpp|h|cu|cuh):\d+: ", "", str(error), flags=re.DOTALL).strip()
        raise UserError(f"{what_failed}: {reason}") from None
