"""Folders of images as a sequence of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.images import LARGEST_SIDE, read_image
from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number, check_at_least, check_range
from mas_embed.runtime.text import printable, shortened

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


@DATASETS.register("folders")
def image_folders(
    *,
    root: str | Path,
    splits: list[str] | int = 5,
    image_size: int = 28,
    channels: Literal[1, 3] = 1,
    unseen_share: float = 0.0,
    held_out: HeldOut = "test",
    seed: int = 0,
) -> list[Split]:
    """Images in folders `<root>/<split>/<class>/<image>`, such as Omniglot's alphabets and characters.

    A quarter of the images of every class is held out for testing, and a fifth of the others for validation. The remaining
    images are trained on. The held-out images are both queries and gallery.

    A share of the classes of every split, `unseen_share`, is reserved for testing, and another share of the same size for
    validation. No image of a reserved class is ever trained on. All images of a class that is reserved for `held_out` are
    queries and gallery, so that retrieval is also evaluated on classes that the network has never seen.

    Args:
        root: the folder that holds one folder for each split.
        splits: the names of the splits in the order in which they are learned; or their number, to take the first ones in
            alphabetical order.
        image_size: height and width in pixels. The shorter side of an image is scaled to this size, and its centre is cropped.
        channels: 1 for the mean of the colours, or 3.
        unseen_share: the share of classes that is reserved for testing, and for validation; from 0 to 0.4.
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing
            options.
        seed: of the random division into training, validation and test images, and of the reserved classes.

    Returns:
        Splits that are named after their folders, in memory; inputs float32 [N, channels, image_size, image_size] in [0, 1].

    Raises:
        UserError: a folder does not exist, a split has fewer than two classes, a class has fewer than 8 images, or a file is
            not a readable image.
    """
    check_held_out(held_out)
    check_range("unseen_share", unseen_share, 0, 0.4)
    check_range("image_size", image_size, 1, LARGEST_SIDE)
    check_at_least("seed", seed, 0)
    if not isinstance(splits, list | tuple):
        splits = as_whole_number("splits, unless it is a list of names,", splits, 1)
    generator, sequence, num_classes, num_items = np.random.default_rng(seed), [], 0, 0
    for folder in _split_folders(Path(root), splits):
        files = _files_by_class(folder)
        labels = torch.repeat_interleave(
            torch.arange(num_classes, num_classes + len(files)), torch.tensor([len(paths) for paths in files])
        )
        images = torch.stack([_image(path, image_size, channels) for paths in files for path in paths])
        train, evaluated = partition(labels, held_out, seed)
        for_test, for_validation = _unseen_classes(labels.unique(), unseen_share, generator)
        unseen, unused = (for_test, for_validation) if held_out == "test" else (for_validation, for_test)
        is_reserved = torch.isin(labels, torch.cat([unseen, unused]))
        train, evaluated = train[~is_reserved[train]], evaluated[~is_reserved[evaluated]]
        evaluated = torch.cat([evaluated, torch.isin(labels, unseen).nonzero()[:, 0]]).sort().values
        sequence.append(_split(folder.name, images, labels, train, evaluated, first_id=num_items))
        num_classes, num_items = num_classes + len(files), num_items + len(labels)
    return sequence


def _split(name: str, images: Tensor, labels: Tensor, train: Tensor, evaluated: Tensor, *, first_id: int) -> Split:
    held_out = Part(images[evaluated], labels[evaluated], evaluated + first_id)
    return Split(name, Part(images[train], labels[train], train + first_id), held_out, held_out)


def _unseen_classes(classes: Tensor, share: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Classes that are reserved for testing, and as many other classes that are reserved for validation."""
    number = round(share * len(classes))
    order = torch.from_numpy(generator.permutation(classes.numpy()))
    return order[:number], order[number : 2 * number]


def _split_folders(root: Path, splits: Sequence[str] | int) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; data.root must hold a folder for every split")
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    names = list(found)[:splits] if isinstance(splits, int) else list(splits)
    missing = [name for name in names if name not in found]
    if missing or not names or (isinstance(splits, int) and len(names) < splits):
        wanted = (
            f"{splits} folders"
            if isinstance(splits, int)
            else f"'{shortened(printable(missing[0]))}'"
            if missing
            else "no folder at all"
        )
        holds = shortened(printable(", ".join(found))) or "no folder"
        raise UserError(f"data.splits asks for {wanted}, but {root} holds {holds}")
    return [found[name] for name in names]


def _files_by_class(folder: Path) -> list[list[Path]]:
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    files = [sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) for folder in classes]
    if len(files) < 2 or min(map(len, files)) < 8:
        raise UserError(
            f"the split {folder} must hold a folder for each of at least two classes, with at least 8 images each "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return files


def _image(path: Path, size: int, channels: int) -> Tensor:
    pixels = read_image(path, size=size, short_side=size).float() / 255
    return pixels.mean(0, keepdim=True) if channels == 1 else pixels
