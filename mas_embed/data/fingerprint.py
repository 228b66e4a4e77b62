"""Fingerprints of data, by which a training that goes on notices that its data has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.split import Part, Split
from mas_embed.data.transforms import AugmentedImages, NormalizedImages
from mas_embed.runtime.arrays import as_tensor
from mas_embed.runtime.fingerprint import fingerprint_of_tensors
from mas_embed.runtime.forward import is_texts


def fingerprint_of_split(split: Split) -> str | None:
    """A short string that changes with the items of a split; None if a file of them is missing, or a part is empty.

    It is made of the labels, and of the values of tensors and arrays, the texts, or the names and sizes of files. Names are
    relative to the folder that all files of a part have in common, and times do not enter, so that data may be copied
    elsewhere. How images are normalized and augmented enters, too. O(values of tensors, length of texts, number of files). Of
    all other inputs only the number enters.
    """
    return _fingerprint_of([split.train, *_held_out(split)])


def fingerprints_of_parts(split: Split) -> dict[str, str | None]:
    """As `fingerprint_of_split`, of the training items and of the held-out items on their own."""
    return {"train": _fingerprint_of([split.train]), "held_out": _fingerprint_of(_held_out(split))}


def _held_out(split: Split) -> list[Part]:
    return [split.query] if split.gallery is split.query else [split.query, split.gallery]


def _fingerprint_of(parts: list[Part]) -> str | None:
    descriptions = [_describe_part(part) if len(part) else None for part in parts]
    if None in descriptions:
        return None
    return hashlib.sha256("\n".join(map(str, descriptions)).encode(errors="surrogatepass")).hexdigest()[:16]


def fingerprint_of_inputs(inputs: Any) -> str | None:
    """As `fingerprint_of_split`, of inputs without labels."""
    description = _describe_inputs(inputs)
    return description and hashlib.sha256(description.encode(errors="surrogatepass")).hexdigest()[:16]


def _describe_part(part: Part) -> str | None:
    described = _describe_inputs(part.inputs)
    if described is None:
        return None
    augmented = "" if part.augmented is None else f" augmented by {_describe_view(part.augmented)}"
    return f"{described} {fingerprint_of_tensors({'labels': part.labels})}{augmented}"


def _describe_view(inputs: Any) -> str:
    """How a training view differs from the clean view, as far as its classes say."""
    if isinstance(inputs, NormalizedImages):
        return f"{inputs!r} {_describe_view(inputs.images)}"
    if isinstance(inputs, ConcatDataset):
        return " ".join(map(_describe_view, inputs.datasets))
    if isinstance(inputs, ItemsByPosition):
        return _describe_view(inputs.dataset)
    return repr(inputs) if isinstance(inputs, AugmentedImages) else type(inputs).__name__


def _describe_inputs(inputs: Any) -> str | None:
    if isinstance(inputs, Tensor | np.ndarray):
        return fingerprint_of_tensors({"inputs": as_tensor(inputs, "the inputs")})
    if isinstance(inputs, ConcatDataset):
        described = [_describe_inputs(one) for one in inputs.datasets]
        return None if None in described else " ".join(map(str, described))
    if isinstance(inputs, ItemsByPosition):
        described_all = _describe_inputs(inputs.dataset)
        return described_all and f"{described_all} {list(inputs.indices)}"
    if isinstance(inputs, NormalizedImages):
        described_images = _describe_inputs(inputs.images)
        return described_images and f"{described_images} {inputs!r}"
    if is_texts(inputs):
        return repr(list(inputs))
    paths = getattr(inputs, "paths", None)
    return f"{len(inputs)} items" if paths is None else _describe_files(paths)


def _describe_files(paths: list[Path]) -> str | None:
    try:
        sizes = [os.stat(path).st_size for path in paths]
    except OSError:
        return None
    folder = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return str([(os.path.relpath(path.absolute(), folder), size) for path, size in zip(paths, sizes, strict=True)])
