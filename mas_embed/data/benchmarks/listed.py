"""What the readers of benchmarks share: lists of a published layout, and the two protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from mas_embed.data.dealt_classes import Classes, Order, deal_classes
from mas_embed.data.image_splits import HeldOutClasses, ImageOptions, ListedImage, check_division, make_image_splits
from mas_embed.data.partition import HeldOut, partition
from mas_embed.data.split import SplitSequence
from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.reading import check_regular_file, read_text
from mas_embed.runtime.text import printable, shortened

Splits = Classes | Literal["groups"]


class BenchmarkImage(NamedTuple):
    """An image of a benchmark.

    Attributes:
        path: of the file.
        label: the name of its class.
        part: that its authors give it: "train", "validation", "test", "query" or "gallery".
        group: of its class, such as the kind of product; "" where there is none.
    """

    path: Path
    label: str
    part: str
    group: str = ""


class Protocol(NamedTuple):
    """How a benchmark is divided; the options that all readers have, see `cub200`."""

    splits: Splits
    order: Order
    held_out_classes: HeldOutClasses
    held_out: HeldOut
    seed: int


def benchmark_splits(
    read: Callable[[], Sequence[BenchmarkImage]],
    options: ImageOptions,
    protocol: Protocol,
    *,
    unseen: Callable[[list[str]], Sequence[str]],
    source: Path,
) -> SplitSequence:
    """The splits of a benchmark.

    Args:
        read: lists its images; called once the protocol is checked.
        options: how files become inputs.
        protocol: how it is divided.
        unseen: which of its classes, in the order of the images, are never trained on where classes are held out.
        source: the folder, for messages.

    Raises:
        UserError: an option is not accepted, a list or a file is not as published, or a split has nothing to train on or to
            evaluate.
    """
    check_division(protocol.held_out, protocol.seed, 0.0, protocol.held_out_classes)
    images = read()
    classes = list(dict.fromkeys(image.label for image in images))
    untrained = [] if protocol.held_out_classes == "seen" else list(unseen(classes))
    trained = _without(classes, untrained)
    if untrained and protocol.held_out == "validation":
        order = np.random.default_rng(protocol.seed).permutation(len(trained))
        untrained = [trained[index] for index in sorted(order[: max(1, len(trained) // 5)])]
        trained = _without(trained, untrained)
    split_of = _dealt(images, trained, protocol, source)
    names = list(dict.fromkeys(split_of.values()))
    if untrained:
        # The first class that is not trained on goes to the first split, like the first that is
        split_of |= _dealt(
            images, untrained, protocol._replace(splits=_number_of(protocol.splits, names)), source, names
        )
    listed = [
        ListedImage(image.path, image.label, split_of[position], part)
        for position, (image, part) in enumerate(zip(images, _parts(images, set(untrained), protocol), strict=True))
        if position in split_of
    ]
    return make_image_splits(
        listed, options, source=source, held_out=protocol.held_out, seed=protocol.seed, split_names=names
    )


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    left_out = set(others)
    return [name for name in names if name not in left_out]


def _number_of(splits: Splits, names: Sequence[str]) -> Splits:
    return "groups" if splits == "groups" else len(names)


def _dealt(
    images: Sequence[BenchmarkImage],
    classes: Sequence[str],
    protocol: Protocol,
    source: Path,
    names: Sequence[str] | None = None,
) -> dict[int, str]:
    """By position of an image of these classes its split."""
    positions: dict[str, list[int]] = {name: [] for name in classes}
    for position, image in enumerate(images):
        if image.label in positions:
            positions[image.label].append(position)
    splits = protocol.splits
    if splits == "groups":
        splits = {}
        for name, of_class in positions.items():
            splits.setdefault(images[of_class[0]].group, []).append(name)
    elif isinstance(splits, str):
        raise UserError(f"splits must be a number, lists of classes, or 'groups', got '{printable(splits)}'")
    dealt = deal_classes(positions, splits, order=protocol.order, seed=protocol.seed, source=source)
    numbered = list(dict.fromkeys(split for split, _, _ in dealt))
    renamed = dict(zip(numbered, numbered if names is None or splits == "groups" else names, strict=False))
    return {position: renamed.get(split, split) for split, _, position in dealt}


def _parts(images: Sequence[BenchmarkImage], untrained: set[str], protocol: Protocol) -> list[str]:
    """The part of every image under the protocol."""
    parts = [image.part for image in images]
    if protocol.held_out == "validation" and "validation" not in parts and protocol.held_out_classes != "unseen":
        labels = {label: number for number, label in enumerate(dict.fromkeys(image.label for image in images))}
        trained = [position for position, part in enumerate(parts) if part == "train"]
        numbers = torch.tensor([labels[images[position].label] for position in trained])
        _, drawn = partition(numbers, "validation", protocol.seed, fewest=2, has_test=True)
        for index in drawn.tolist():
            parts[trained[index]] = "validation"
    for position, image in enumerate(images):
        if image.label in untrained and not (protocol.held_out == "test" and parts[position] in ("query", "gallery")):
            parts[position] = protocol.held_out
        elif image.label not in untrained and protocol.held_out_classes == "unseen":
            parts[position] = "train"
    return parts


def second_half(classes: list[str]) -> list[str]:
    """The second half of the classes, which the protocol of metric learning never trains on."""
    return classes[len(classes) // 2 :]


def found_folder(root: str | Path, *names: str, holds: str) -> Path:
    """The folder that holds a file or folder of a layout: `root`, or one of these folders in it.

    Raises:
        UserError: none does.
    """
    for folder in (Path(root), *(Path(root) / name for name in names)):
        if (folder / holds).exists():
            return folder
    raise UserError(f"there is no {holds} in {root}; data.root must be the folder that holds it")


def read_rows(
    path: Path, num_columns: int, *, separator: str | None = None, skip: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """Yields for every line its location and its columns, the last of which may hold separators.

    Args:
        path: of the list.
        num_columns: the number of columns.
        separator: None for white space.
        skip: lines at the start.

    Raises:
        UserError: the list cannot be read, or a line has fewer columns.
    """
    for number, line in enumerate(read_text(path, "the list").splitlines(), start=1):
        if number <= skip or not line.strip():
            continue
        columns = [column.strip() for column in line.strip().split(separator, num_columns - 1)]
        where = f"line {number} of {path}"
        if len(columns) < num_columns:
            raise UserError(f"{where} must have {num_columns} columns, got '{shortened(printable(line.strip()), 60)}'")
        yield where, columns


def read_mat(path: Path, *names: str) -> list[Any]:
    """Variables of a MATLAB file.

    Raises:
        UserError: it cannot be read, or lacks one of them.
    """
    from scipy.io import loadmat

    check_regular_file(path, "the MATLAB file")
    try:
        variables = loadmat(path, squeeze_me=True)
    except Exception as error:  # for a damaged file one of many kinds
        raise UserError(f"{path} is not a readable MATLAB file: {reason_of(error)}") from None
    missing = [name for name in names if name not in variables]
    if missing:
        raise UserError(f"{path} lacks the variable '{missing[0]}'; is it the published file?")
    return [variables[name] for name in names]


def as_index(value: str, where: str, known: Mapping[str, Any]) -> str:
    """An id that must be known; raises `UserError` that names the line."""
    if value not in known:
        raise UserError(f"{where} has the id '{shortened(printable(value), 40)}', which the list of them lacks")
    return value


def check_split_option(splits: Splits, has_groups: bool) -> None:
    """Raises `UserError` for `groups` of a benchmark that has none."""
    if isinstance(splits, str):
        check_choice("splits, unless it is a number or lists of classes,", splits, ("groups",))
        if not has_groups:
            raise UserError(
                "the classes of this data set have no groups; give the number of splits, or lists of classes"
            )
