"""The Grocery Store data set."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from mas_embed.data.benchmarks.listed import (
    BenchmarkImage,
    Protocol,
    Splits,
    as_index,
    benchmark_splits,
    check_split_option,
    found_folder,
    read_rows,
)
from mas_embed.data.dealt_classes import Order
from mas_embed.data.image_splits import HeldOutClasses, ImageOptions
from mas_embed.data.images import Unreadable, find_inside
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.reading import read_text

_GROUPS = ("Fruit", "Vegetables", "Packages")  # in the order in which they are learned


@DATASETS.register("grocery")
def grocery(
    *,
    root: str | Path,
    labels: Literal["fine", "coarse"] = "fine",
    splits: Splits = "groups",
    order: Order = "listed",
    held_out_classes: HeldOutClasses = "seen",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = None,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """Grocery Store: 5,421 photographs of 81 products in 43 coarse classes (Klasson, Zhang, Kjellstroem, WACV 2019).

    Reads `classes.csv`, `train.txt`, `val.txt`, `test.txt` and the images that they list.

    Args:
        root: the folder of these files, or one that holds it as `dataset`.
        labels: "fine" for the product, "coarse" for its kind, by which products such as all apples are one class.
        splits: "groups" for fruit, then vegetables, then packages; or how the classes are dealt into splits, see `cub200`, like
            all other options.
        order: "listed" for the order of the published lists, or "random".
        held_out_classes: "seen" for the published lists; "unseen" trains on all images of every second class of a group, and
            evaluates the others; "both".
        held_out: "test", or "validation" for the published validation images, and for "unseen" a fifth of the classes.
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side is scaled before the centre is cropped, in pixels; None for
            `image_size`.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB.
        seed: of all random draws.

    Raises:
        UserError: a file is missing or is not as published; the message names the line.

    Warns:
        UserWarning: a held-out image is the only one of its class. It is then in the gallery, and is no query.
    """
    check_choice("labels", labels, ("fine", "coarse"))
    check_split_option(splits, has_groups=True)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    folder = found_folder(root, "dataset", holds="classes.csv")
    return benchmark_splits(
        lambda: _groceries(folder, labels),
        options,
        Protocol(splits, order, held_out_classes, held_out, seed),
        unseen=lambda classes: classes[1::2],
        source=folder,
    )


def _groceries(folder: Path, labels: str) -> list[BenchmarkImage]:
    names = _class_names(folder / "classes.csv")
    images = []
    for part, list_name in (("train", "train"), ("validation", "val"), ("test", "test")):
        for where, (link, fine, coarse) in read_rows(folder / f"{list_name}.txt", 3, separator=","):
            product, kind, number = names[as_index(fine, where, names)]
            if coarse != number:
                raise UserError(
                    f"{where} gives the product {fine} the kind {coarse}, but classes.csv gives it {number}"
                )
            path = find_inside(folder, link, listed_in=where)
            group = link.split("/")[1] if link.count("/") else ""
            images.append(BenchmarkImage(path, product if labels == "fine" else kind, part, group))
    order = {group: index for index, group in enumerate(_GROUPS)}
    return sorted(images, key=lambda image: order.get(image.group, len(order)))


def _class_names(path: Path) -> dict[str, tuple[str, str, str]]:
    """By number of a product its name, the name of its kind and the number of its kind."""
    rows = list(csv.reader(read_text(path, "the list").splitlines()))
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 4:
            raise UserError(
                f"line {number} of {path} must have at least 4 columns: name, number, kind, number of the kind"
            )
    return {row[1].strip(): (row[0].strip(), row[2].strip(), row[3].strip()) for row in rows[1:]}
