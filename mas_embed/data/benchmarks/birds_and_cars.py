"""CUB-200-2011 and Cars196."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from mas_embed.data.benchmarks.listed import (
    BenchmarkImage,
    Protocol,
    as_index,
    benchmark_splits,
    found_folder,
    read_mat,
    read_rows,
    second_half,
)
from mas_embed.data.dealt_classes import Classes, Order
from mas_embed.data.image_splits import HeldOutClasses, ImageOptions
from mas_embed.data.images import Unreadable, find_inside
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError


@DATASETS.register("cub200")
def cub200(
    *,
    root: str | Path,
    splits: Classes = 5,
    order: Order = "listed",
    held_out_classes: HeldOutClasses = "unseen",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = 256,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """CUB-200-2011: 11,788 photographs of 200 species of birds (Wah, Branson, Welinder, Perona, Belongie, 2011).

    Reads `images.txt`, `classes.txt`, `image_class_labels.txt`, `train_test_split.txt` and `images/`.

    Args:
        root: the folder `CUB_200_2011`, or the one that holds it.
        splits: how the classes that are trained on are dealt into splits, see `image_folder`. Classes that are never trained on
            are dealt into the same number.
        order: "listed" for the order of the published lists, or "random".
        held_out_classes: "unseen" for the protocol of metric learning: the first half of the classes is trained on with all
            images, the second half is evaluated (Oh Song et al., CVPR 2016). "seen" trains on the training images of all
            classes and evaluates their test images. "both" trains on the training images of the first half, and evaluates their
            test images and all images of the second half.
        held_out: "test" trains on everything that the protocol trains on. "validation" takes a fifth of it away: of the
            training classes for "unseen", of the training images of every class for "seen", and both for "both".
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side of an image is scaled before its centre is cropped, in pixels; None for
            `image_size`.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB; 0 to decode an image each time it is used.
        seed: of all random draws.

    Returns:
        The splits; inputs float32 [channels, image_size, image_size] in [0, 1]; `label_names` has the names of the classes.

    Raises:
        UserError: a file is missing or is not as published; the message names the line.
    """
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    folder = found_folder(root, "CUB_200_2011", holds="images.txt")
    return benchmark_splits(
        lambda: _cub_images(folder),
        options,
        Protocol(splits, order, held_out_classes, held_out, seed),
        unseen=second_half,
        source=folder,
    )


def _cub_images(folder: Path) -> list[BenchmarkImage]:
    names = {number: name for _, (number, name) in read_rows(folder / "classes.txt", 2)}
    paths = {
        number: find_inside(folder / "images", link, listed_in=where)
        for where, (number, link) in read_rows(folder / "images.txt", 2)
    }
    labels, parts = {}, {}
    for where, (number, label) in read_rows(folder / "image_class_labels.txt", 2):
        labels[as_index(number, where, paths)] = names[as_index(label, where, names)]
    for where, (number, is_train) in read_rows(folder / "train_test_split.txt", 2):
        parts[as_index(number, where, paths)] = "train" if is_train == "1" else "test"
    for name, listed in (("image_class_labels.txt", labels), ("train_test_split.txt", parts)):
        if len(listed) != len(paths):
            raise UserError(f"{folder / name} lists {len(listed)} images, but images.txt lists {len(paths)}")
    return [BenchmarkImage(path, labels[number], parts[number]) for number, path in paths.items()]


@DATASETS.register("cars196")
def cars196(
    *,
    root: str | Path,
    splits: Classes = 5,
    order: Order = "listed",
    held_out_classes: HeldOutClasses = "unseen",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = 256,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """Cars196: 16,185 photographs of 196 models of cars (Krause, Stark, Deng, Fei-Fei, 2013).

    Reads either of the two published layouts: `cars_annos.mat` with `car_ims/`; or `devkit/cars_meta.mat`,
    `devkit/cars_train_annos.mat`, `cars_test_annos_withlabels.mat` (beside or inside `devkit/`), `cars_train/` and
    `cars_test/`.

    Args:
        root: the folder of either layout, or one that holds it as `stanford_cars`.
        splits: see `cub200`, like all other options.
        order: "listed" for the order of the classes' numbers, or "random".
        held_out_classes: "unseen" for the protocol of metric learning, which trains on the first 98 classes; "seen" or "both".
        held_out: "test" or "validation".
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side is scaled before the centre is cropped, in pixels.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB.
        seed: of all random draws.

    Raises:
        UserError: a file is missing or is not as published; the message names the entry.
    """
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    is_one = any((Path(root) / name / "cars_annos.mat").exists() for name in ("", "stanford_cars"))
    folder = found_folder(root, "stanford_cars", holds="cars_annos.mat" if is_one else "devkit")
    return benchmark_splits(
        lambda: _car_images(folder) if is_one else _car_images_of_devkit(folder),
        options,
        Protocol(splits, order, held_out_classes, held_out, seed),
        unseen=second_half,
        source=folder,
    )


def _car_images(folder: Path) -> list[BenchmarkImage]:
    path = folder / "cars_annos.mat"
    annotations, names = read_mat(path, "annotations", "class_names")
    images = [
        (int(label), link, "test" if is_test else "train", f"entry {number} of {path}")
        for number, (link, label, is_test) in enumerate(
            _fields(path, annotations, "relative_im_path", "class", "test"), 1
        )
    ]
    return _by_class(images, np.atleast_1d(names), folder)


def _car_images_of_devkit(folder: Path) -> list[BenchmarkImage]:
    (names,) = read_mat(folder / "devkit" / "cars_meta.mat", "class_names")
    tested = found_folder(folder, "devkit", holds="cars_test_annos_withlabels.mat") / "cars_test_annos_withlabels.mat"
    images = []
    for part, path in (("train", folder / "devkit" / "cars_train_annos.mat"), ("test", tested)):
        (annotations,) = read_mat(path, "annotations")
        for number, (name, label) in enumerate(_fields(path, annotations, "fname", "class"), 1):
            images.append((int(label), f"cars_{part}/{name}", part, f"entry {number} of {path}"))
    return _by_class(images, np.atleast_1d(names), folder)


def _fields(path: Path, annotations: Any, *names: str) -> list[tuple[Any, ...]]:
    entries = np.atleast_1d(annotations)
    missing = [name for name in names if name not in (entries.dtype.names or ())]
    if missing:
        raise UserError(f"the annotations of {path} lack the field '{missing[0]}'; is it the published file?")
    return [tuple(entry[name] for name in names) for entry in entries]


def _by_class(images: list[tuple[int, str, str, str]], names: Any, folder: Path) -> list[BenchmarkImage]:
    """The images in the order of the numbers of their classes, from 1."""
    for label, _, _, where in images:
        if not 1 <= label <= len(names):
            raise UserError(f"{where} has the class {label}, but there are {len(names)} classes")
    return [
        BenchmarkImage(find_inside(folder, str(link), listed_in=where), str(names[label - 1]), part)
        for label, link, part, where in sorted(images, key=lambda image: image[0])
    ]
