"""Stanford Online Products and In-shop Clothes Retrieval, whose test images are of products that are never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mas_embed.data.benchmarks.listed import (
    BenchmarkImage,
    Protocol,
    Splits,
    benchmark_splits,
    check_split_option,
    found_folder,
    read_rows,
)
from mas_embed.data.dealt_classes import Order
from mas_embed.data.image_splits import ImageOptions
from mas_embed.data.images import Unreadable, find_inside
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError
from mas_embed.runtime.reading import read_text


@DATASETS.register("stanford_online_products")
def stanford_online_products(
    *,
    root: str | Path,
    splits: Splits = "groups",
    order: Order = "listed",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = 256,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """Stanford Online Products: 120,053 photographs of 22,634 products of 12 kinds (Oh Song, Xiang, Jegelka, Savarese, 2016).

    Reads `Ebay_train.txt`, `Ebay_test.txt` and the folders of the kinds. The products of the test list are never trained on.

    Args:
        root: the folder `Stanford_Online_Products`, or the one that holds it.
        splits: "groups" for one split for each kind of product; or how the products are dealt into splits, see `cub200`.
        order: "listed" for the order of the published lists, or "random".
        held_out: "test" for the test list, or "validation" for a fifth of the training products, which are then not trained on.
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side is scaled before the centre is cropped, in pixels.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB.
        seed: of all random draws.

    Raises:
        UserError: a file is missing or is not as published; the message names the line.
    """
    check_split_option(splits, has_groups=True)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    folder = found_folder(root, "Stanford_Online_Products", holds="Ebay_train.txt")
    return _of_products(
        lambda: _ebay_images(folder), options, Protocol(splits, order, "unseen", held_out, seed), folder
    )


def _ebay_images(folder: Path) -> list[BenchmarkImage]:
    images = []
    for part in ("train", "test"):
        for where, (_, label, _, link) in read_rows(folder / f"Ebay_{part}.txt", 4, skip=1):
            path = find_inside(folder, link, listed_in=where)
            images.append(BenchmarkImage(path, label, part, link.split("/")[0].removesuffix("_final")))
    return images


@DATASETS.register("in_shop")
def in_shop(
    *,
    root: str | Path,
    splits: Splits = "groups",
    order: Order = "listed",
    held_out: HeldOut = "test",
    image_size: int = 224,
    short_side: int | None = 256,
    channels: Literal[1, 3] = 3,
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> SplitSequence:
    """In-shop Clothes Retrieval: 52,712 photographs of 7,982 clothes (DeepFashion; Liu, Luo, Qiu, Wang, Tang, CVPR 2016).

    Reads `list_eval_partition.txt` (in `Eval/` or beside the images) and `img/` (in `Img/` or in `root`). The clothes of the
    queries and of the gallery are never trained on. Queries are not in the gallery.

    Args:
        root: the folder of the benchmark.
        splits: "groups" for one split for each kind of clothes, such as "WOMEN/Dresses"; or how the clothes are dealt into
            splits, see `cub200`.
        order: "listed" for the order of the published list, or "random".
        held_out: "test" for the published queries and gallery, or "validation" for a fifth of the training clothes, which are
            then not trained on.
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side is scaled before the centre is cropped, in pixels.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB.
        seed: of all random draws.

    Raises:
        UserError: a file is missing or is not as published; the message names the line.
    """
    check_split_option(splits, has_groups=True)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    lists = found_folder(root, "Eval", "Anno", holds="list_eval_partition.txt")
    pictures = found_folder(root, "Img", holds="img")
    return _of_products(
        lambda: _clothes(lists / "list_eval_partition.txt", pictures),
        options,
        Protocol(splits, order, "unseen", held_out, seed),
        Path(root),
    )


def _clothes(path: Path, folder: Path) -> list[BenchmarkImage]:
    images = []
    for where, (link, item, part) in read_rows(path, 3, skip=2):
        if part not in ("train", "query", "gallery"):
            raise UserError(f"{where} has the part '{part}'; it must be train, query or gallery")
        kind = "/".join(link.split("/")[1:3])
        images.append(BenchmarkImage(find_inside(folder, link, listed_in=where), item, part, kind))
    promised = read_text(path, "the list").split("\n", 1)[0].strip()
    if promised != str(len(images)):
        raise UserError(f"line 1 of {path} promises '{promised[:20]}' images, but {len(images)} are listed")
    return images


def _of_products(read: object, options: ImageOptions, protocol: Protocol, folder: Path) -> SplitSequence:
    """The splits of a benchmark whose lists say which classes are never trained on."""
    images = read()  # type: ignore[operator]
    trained = {image.label for image in images if image.part == "train"}
    tested = list(dict.fromkeys(image.label for image in images if image.part != "train"))
    for label in tested:
        if label in trained:
            raise UserError(f"the class {label} of {folder} is listed both for training and for testing")
    return benchmark_splits(lambda: images, options, protocol, unseen=lambda classes: tested, source=folder)
