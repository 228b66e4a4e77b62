"""Flowers-102."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mas_embed.data.benchmarks.listed import (
    BenchmarkImage,
    Protocol,
    benchmark_splits,
    found_folder,
    read_mat,
    second_half,
)
from mas_embed.data.dealt_classes import Classes, Order
from mas_embed.data.image_splits import HeldOutClasses, ImageOptions
from mas_embed.data.images import Unreadable, find_inside
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError


@DATASETS.register("flowers102")
def flowers102(
    *,
    root: str | Path,
    splits: Classes = 6,
    order: Order = "listed",
    held_out_classes: HeldOutClasses = "seen",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = 256,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """Flowers-102: 8,189 photographs of 102 kinds of flowers (Nilsback, Zisserman, 2008).

    Reads `imagelabels.mat`, `setid.mat` and `jpg/`. Its lists have 10 training images and 10 validation images of every class.

    Args:
        root: the folder of these files, or one that holds it as `flowers-102`, as torchvision does.
        splits: see `cub200`, like all other options.
        order: "listed" for the order of the classes' numbers, or "random".
        held_out_classes: "seen" for the published lists; "unseen" trains on all images of the first half of the classes, and
            evaluates the second half; "both".
        held_out: "test", or "validation" for the published validation images, and for "unseen" a fifth of the classes.
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side is scaled before the centre is cropped, in pixels.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB.
        seed: of all random draws.

    Raises:
        UserError: a file is missing or is not as published.
    """
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    folder = found_folder(root, "flowers-102", holds="imagelabels.mat")
    return benchmark_splits(
        lambda: _flowers(folder),
        options,
        Protocol(splits, order, held_out_classes, held_out, seed),
        unseen=second_half,
        source=folder,
    )


def _flowers(folder: Path) -> list[BenchmarkImage]:
    (labels,) = read_mat(folder / "imagelabels.mat", "labels")
    labels = np.atleast_1d(labels).astype(int)
    lists = read_mat(folder / "setid.mat", "trnid", "valid", "tstid")
    part_of: dict[int, str] = {}
    for part, numbers in zip(("train", "validation", "test"), lists, strict=True):
        for number in np.atleast_1d(numbers).astype(int).tolist():
            if number in part_of or not 1 <= number <= len(labels):
                reason = "twice" if number in part_of else f"but there are {len(labels)} labels"
                raise UserError(f"{folder / 'setid.mat'} lists image {number} {reason}")
            part_of[number] = part
    return [
        BenchmarkImage(
            find_inside(
                folder / "jpg", f"image_{number:05}.jpg", listed_in=f"entry {number} of {folder / 'setid.mat'}"
            ),
            str(labels[number - 1]),
            part_of[number],
        )
        for number in sorted(part_of, key=lambda number: (labels[number - 1], number))
    ]
