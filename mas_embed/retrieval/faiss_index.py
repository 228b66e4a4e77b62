"""Functions on FAISS indexes: creation, training size, devices, files, and conversion of errors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mas_embed.errors import UserError, reason_of
from mas_embed.retrieval.search import import_faiss
from mas_embed.retrieval.similarity import Distance, check_distance
from mas_embed.runtime.atomic_files import atomic_file
from mas_embed.runtime.checks import as_number, as_whole_number, check_range
from mas_embed.runtime.text import printable, shortened

# Descriptions outside of these bounds crash FAISS or keep it busy for ever; the numbers are sizes, and none of use is larger
LONGEST_FACTORY = 200
SMALLEST_NUMBER, LARGEST_NUMBER = {"HNSW": 2}, {"IVF": 2**24}
LARGEST_OTHER_NUMBER = 2**12
# FAISS never returns from building an NSG graph of equal vectors, and crashes with a quantizer of norms called cqint8
REFUSED_WORDS = ("NSG", "cqint")
# FAISS makes an integer of a search parameter, and allocates memory for as many candidates
PARAMETERS_THAT_ARE_OFF_AT_0, LARGEST_PARAMETER = ("verbose", "max_codes", "ht"), 2**20


def check_factory(factory: str) -> None:
    """Raises `UserError` for a description that FAISS does not refuse, but that ends the process or takes for ever.

    >>> check_factory("IVF4096,PQ64")
    >>> check_factory("HNSW1")
    Traceback (most recent call last):
    mas_embed.errors.UserError: the number after 'HNSW' in factory 'HNSW1' must be from 2 to 4096
    """
    is_short_text = isinstance(factory, str) and len(factory) <= LONGEST_FACTORY
    if not is_short_text or not factory.isascii() or not factory.isprintable():
        given = shortened(printable(repr(factory)), 80)
        raise UserError(
            f"factory must be a description for FAISS's index_factory of at most {LONGEST_FACTORY} characters, got {given}"
        )
    for word in REFUSED_WORDS:
        if word in factory:
            raise UserError(
                f"factory '{factory}' has a '{word}', which FAISS does not build safely; use 'HNSW32' or 'IVF'"
            )
    for word, digits in re.findall(r"([A-Za-z]*)(\d+)", factory):
        least, most = SMALLEST_NUMBER.get(word, 1), LARGEST_NUMBER.get(word, LARGEST_OTHER_NUMBER)
        if not least <= int(digits) <= most:
            raise UserError(f"the number after '{word}' in factory '{factory}' must be from {least} to {most}")


def empty_index(size: int, factory: str, distance: Distance) -> Any:
    """A FAISS index for vectors of `size` dimensions, without vectors, on the CPU.

    Raises:
        UserError: the distance does not exist, or FAISS cannot create such an index.
    """
    check_distance(distance)
    check_factory(factory)
    failure = f"FAISS cannot make an index '{factory}' for {distance} of {size} dimensions"
    with faiss_errors_as_user_errors(failure):
        index = import_faiss().index_factory(size, factory, _metric_of(distance))
    if index.metric_type != _metric_of(distance):  # some kinds of index ignore the metric that they are given
        raise UserError(f"{failure}: it supports other distances only")
    return index


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


def write_index(index: Any, path: Path) -> str:
    """Writes the index atomically in FAISS's file format, and returns the SHA-256 of the file as hexadecimal digits.

    Raises:
        UserError: the file cannot be written.
        RunError: the disk is full.
    """
    faiss, digest = import_faiss(), hashlib.sha256()

    def write(block: bytes) -> None:
        digest.update(block)
        file.write(block)

    with atomic_file(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
    return digest.hexdigest()


def read_index(path: Path, distance: Distance, *, memory_map: bool) -> Any:
    """The index in a file that `write_index` wrote, read into memory or, with `memory_map`, mapped.

    Raises:
        UserError: the file is damaged, or is an index for another distance.
    """
    faiss = import_faiss()
    with faiss_errors_as_user_errors(f"cannot read {path} as a FAISS index"):
        # IO_FLAG_MMAP, without _IFC, would map only the inverted lists of "IVF" indexes
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)
    if index.metric_type != _metric_of(distance):
        raise UserError(f"{path} is an index for another distance than '{distance}'; save the index again")
    return index


def _metric_of(distance: Distance) -> int:
    faiss = import_faiss()
    return int(faiss.METRIC_L2 if distance == "euclidean" else faiss.METRIC_INNER_PRODUCT)


@contextmanager
def faiss_errors_as_user_errors(failure: str) -> Iterator[None]:
    """Raises FAISS's errors as `UserError`, with the given description and without the position in FAISS's source."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = re.sub(r"^Error in .*?\.(cpp|h|cu|cuh):\d+: ", "", reason_of(error, 1000), flags=re.DOTALL)
        raise UserError(f"{failure}: {shortened(reason, 300)}") from None


def as_search_parameter(name: str, value: object) -> float:
    """The value of one of FAISS's search parameters; raises `UserError` if it is out of range, which FAISS does not check."""
    if not isinstance(name, str):
        raise UserError(f"the name of a search parameter must be a string, got {name!r}")
    number = as_number(name, value) if "k_factor" in name else as_whole_number(name, value)
    check_range(name, number, 0 if name in PARAMETERS_THAT_ARE_OFF_AT_0 else 1, LARGEST_PARAMETER)
    return float(number)
