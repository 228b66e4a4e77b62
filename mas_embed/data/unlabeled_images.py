"""A folder of images without labels, prepared as the images of a data set are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.class_folders import SUFFIXES, entries, warn_of_others
from mas_embed.data.images import ImageFiles, Unreadable, readable_images
from mas_embed.data.split import Part
from mas_embed.data.transforms import NormalizedImages
from mas_embed.errors import UserError


def unlabeled_images(
    folder: str | Path, *, like: Part, unreadable: Unreadable = "error", keep_megabytes: int = 1024
) -> Any:
    """The images of a folder without labels, prepared as the clean view of a part is: a sequence of float32 [C, H, W].

    Size, crop, channels and normalized colours are those of `like`. Augmentation is not applied. Such a sequence is what a
    method can consolidate on, as `ordered_batches(images, batch_size=64)` or as `importance_data` of `train_sequence`.

    Args:
        folder: holds images, also in folders inside it, which are not followed through symbolic links. The order is
            alphabetical.
        like: a part of a data set of image files, such as `splits[0].train`.
        unreadable: what to do with files that are no readable images: "error", "skip" or "unchecked", as in `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB; 0 to decode an image each time it is used.

    Returns:
        A sequence with a length, whose items are indexed by position.

    Raises:
        UserError: the folder cannot be read or holds no image; a file is no readable image; or the inputs of `like` are not
            read from image files, so that it is not known how they were prepared.

    Warns:
        UserWarning: files without the suffix of an image, and unreadable ones, are left out.
    """
    folder = Path(folder)
    found = list(_files(folder))
    paths = [path for path in found if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    if not paths:
        raise UserError(f"{folder} holds no image; it must hold files such as .jpg or .png")
    known = set(paths)
    warn_of_others([path for path in found if path not in known], folder, "are no image files")
    files = _reader(like.inputs).of_files(paths, keep_megabytes=keep_megabytes)
    readable = readable_images(files, unreadable)
    if not readable:
        raise UserError(f"{folder} holds no readable image")
    return _prepared_like(like.inputs, files if len(readable) == len(files) else files.at(readable))


def _files(folder: Path) -> Iterator[Path]:
    """Every file inside a folder, folder by folder; of a link to a folder the link itself."""
    for path in entries(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _reader(inputs: Any) -> ImageFiles:
    """The image files that inputs are made of, which know how an image is read."""
    if isinstance(inputs, ImageFiles):
        return inputs
    if isinstance(inputs, NormalizedImages):
        return _reader(inputs.images)
    if isinstance(inputs, ConcatDataset):
        return _reader(inputs.datasets[0])
    if isinstance(inputs, ItemsByPosition):
        return _reader(inputs.dataset)
    raise UserError(
        f"images of a folder can be prepared only as those of a data set of image files, but this data set holds a "
        f"{type(inputs).__name__}; give inputs of the data set itself, as a subset does"
    )


def _prepared_like(inputs: Any, files: ImageFiles) -> Any:
    """The files with the colours normalized as those of the inputs are."""
    if isinstance(inputs, NormalizedImages):
        return NormalizedImages(_prepared_like(inputs.images, files), inputs.preprocessing)
    if isinstance(inputs, ConcatDataset):
        return _prepared_like(inputs.datasets[0], files)
    return _prepared_like(inputs.dataset, files) if isinstance(inputs, ItemsByPosition) else files
