"""Folders of images as a sequence of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.images import read_image
from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError

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

    Of every class a quarter of the images is the test part, a fifth of the rest the validation part, and what remains is
    trained on. Of the classes of a split, `unseen_share` are never trained on under "test" and as many others under
    "validation": all their images are held out, so that queries and gallery hold new classes too. Held-out images are
    queries and gallery at once.

    Args:
        root: the folder of the splits' folders.
        splits: their names in the order in which they are learned, or how many of them, in alphabetical order.
        image_size: pixels a side; the shorter side is scaled to it, and the centre cut out.
        channels: 1 (mean of the colours) or 3.
        unseen_share: from 0 to 0.4.
        held_out: what the splits are judged by: "test" for figures that are reported, "validation" for choosing
            options.
        seed: of the partition.

    Returns:
        Inputs float32 [N, channels, image_size, image_size] in [0, 1], in memory.

    Raises:
        UserError: there is no such folder, a split has no class with at least 8 images, or a file is no readable image.
    """
    check_held_out(held_out)
    if not 0 <= unseen_share <= 0.4:
        raise UserError(f"unseen_share must be from 0 to 0.4, got {unseen_share}")
    generator, sequence, num_classes, num_items = np.random.default_rng(seed), [], 0, 0
    for folder in _split_folders(Path(root), splits):
        files = _files_by_class(folder)
        labels = torch.repeat_interleave(
            torch.arange(num_classes, num_classes + len(files)), torch.tensor([len(own) for own in files])
        )
        images = torch.stack([_image(path, image_size, channels) for own in files for path in own])
        train, held = partition(labels, held_out, seed)
        tested, validated = _unseen_classes(labels.unique(), unseen_share, generator)
        hidden, extra = (tested, validated) if held_out == "test" else (validated, tested)
        is_trained = ~torch.isin(labels[train], torch.cat([hidden, extra]))
        is_judged = ~torch.isin(labels[held], extra)
        judged = torch.cat([held[is_judged], torch.isin(labels, hidden).nonzero()[:, 0]]).unique()
        sequence.append(_split(folder.name, images, labels, train[is_trained], judged, first_id=num_items))
        num_classes, num_items = num_classes + len(files), num_items + len(labels)
    return sequence


def _split(name: str, images: Tensor, labels: Tensor, train: Tensor, judged: Tensor, *, first_id: int) -> Split:
    held_out = Part(images[judged], labels[judged], judged + first_id)
    return Split(name, Part(images[train], labels[train], train + first_id), held_out, held_out)


def _unseen_classes(classes: Tensor, share: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Classes that are new when testing, and others that are new when validating; as many each."""
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
        wanted = f"{splits} folders" if isinstance(splits, int) else f"'{missing[0]}'" if missing else "a split"
        raise UserError(f"{root} has no {wanted} for data.splits; it has {', '.join(found) or 'no folder'}")
    return [found[name] for name in names]


def _files_by_class(folder: Path) -> list[list[Path]]:
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    files = [sorted(path for path in own.iterdir() if path.suffix.lower() in SUFFIXES) for own in classes]
    if len(files) < 2 or min(map(len, files)) < 8:
        raise UserError(
            f"the split {folder} must hold at least two folders of classes, with at least 8 images each "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return files


def _image(path: Path, size: int, channels: int) -> Tensor:
    pixels = read_image(path, size=size, short_side=size).float() / 255
    return pixels.mean(0, keepdim=True) if channels == 1 else pixels
