"""Folders of images as a sequence of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mas_embed.data.class_folders import ClassFolders, entries
from mas_embed.data.dealt_classes import Classes, Order, deal_classes, without_missing_classes
from mas_embed.data.image_splits import (
    HeldOutClasses,
    ImageOptions,
    ListedImage,
    check_division,
    make_image_splits,
    warn_of_small_classes,
)
from mas_embed.data.images import Unreadable
from mas_embed.data.learned import LearnedSplits
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number
from mas_embed.runtime.text import printable, shortened

FEWEST_IMAGES = 8  # of a class in a folder of a split


@DATASETS.register("image_folder")
def image_folder(
    *,
    root: str | Path,
    splits: Classes = 5,
    order: Order = "listed",
    image_size: int = 224,
    short_side: int | None = None,
    channels: Literal[1, 3] = 3,
    unseen_share: float = 0.0,
    held_out_classes: HeldOutClasses = "both",
    held_out: HeldOut = "test",
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
    learned: LearnedSplits | None = None,
) -> SplitSequence:
    """Images in folders `<root>/<class>/<image>`, whose classes are dealt into splits.

    A quarter of the images of every class is held out for testing, and a fifth of the others for validation, at least two each
    where at least two remain. The remaining images are trained on. The held-out images are both queries and gallery. The files
    are decoded when they are used, see `ImageFiles`.

    Args:
        root: the folder that holds one folder for each class. Files such as .DS_Store and Thumbs.db are ignored.
        splits: the number of splits, which then have the names "1", "2", ...; or a list of the classes of each split; or these
            by the name of the split. The images of a class that is in several splits are dealt to these at random, so that the
            class comes back with other images. Classes in no split are left out.
        order: in which the classes are dealt into a number of splits: "listed" for alphabetical order, or "random".
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side of an image is scaled before its centre is cropped, in pixels; None for
            `image_size`. A random crop is taken from the scaled image, too.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unseen_share: the share of the classes of every split that is reserved for testing, and another one for validation; from
            0 to 0.4. No image of a reserved class is trained on, and all images of a class that is reserved for `held_out` are
            held out.
        held_out_classes: which held-out images the splits are evaluated on: those of classes that are trained on ("seen"), of
            reserved classes ("unseen"), or "both".
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing options.
        unreadable: every image is decoded once when the data set is read. "error" refuses the data set if one is unreadable;
            "skip" leaves such images out with a warning; "unchecked" decodes none before it is used.
        keep_megabytes: the memory for decoded images, in MiB; 0 to decode an image each time it is used.
        seed: of all random draws.
        learned: splits that were learned before and whose data may be gone, see `LearnedSplits`; a run that is resumed gives it.

    Returns:
        The splits; inputs float32 [channels, image_size, image_size] in [0, 1]. Labels are numbered split by split, and
        `label_names` has the names of the folders.

    Raises:
        UserError: the folder does not exist or holds no folders of images, a class of `splits` is unknown, a file is no
            readable image, or a split has nothing to train on or to evaluate.

    Warns:
        UserWarning: a class is empty or has fewer than four images, or files are left out.
    """
    check_division(held_out, seed, unseen_share, held_out_classes)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    root = _checked_root(root, "a folder for every class")
    folders = ClassFolders()
    classes = folders.read(root)
    if not classes:
        raise UserError(f"{root} holds no folder of images; it must hold one for every class{_hint(folders)}")
    folders.warn(root)
    warn_of_small_classes({name: len(paths) for name, paths in classes.items()}, root)
    paths = [path for of_class in classes.values() for path in of_class]
    starts = dict(zip(classes, _starts(classes.values()), strict=True))
    splits, split_names = without_missing_classes(splits, classes, learned, root)
    dealt = deal_classes(
        {name: range(starts[name], starts[name] + len(of_class)) for name, of_class in classes.items()},
        splits,
        order=order,
        seed=seed,
        source=root,
    )
    return make_image_splits(
        [ListedImage(paths[position], label, split) for split, label, position in dealt],
        options,
        source=root,
        held_out=held_out,
        seed=seed,
        unseen_share=unseen_share,
        held_out_classes=held_out_classes,
        split_names=split_names,
        learned=learned,
    )


@DATASETS.register("folders")
def image_folders(
    *,
    root: str | Path,
    splits: list[str] | int = 5,
    image_size: int = 28,
    short_side: int | None = None,
    channels: Literal[1, 3] = 1,
    shared_classes: bool = False,
    unseen_share: float = 0.0,
    held_out_classes: HeldOutClasses = "both",
    held_out: HeldOut = "test",
    unreadable: Unreadable = "error",
    keep_megabytes: int = 1024,
    seed: int = 0,
    learned: LearnedSplits | None = None,
) -> SplitSequence:
    """Images in folders `<root>/<split>/<class>/<image>`, such as Omniglot's alphabets and characters.

    A quarter of the images of every class is held out for testing, and a fifth of the others for validation, at least two each.
    The remaining images are trained on. The held-out images are both queries and gallery. The files are decoded when they are
    used, see `ImageFiles`.

    A share of the classes of every split, `unseen_share`, is reserved for testing, and another share of the same size for
    validation. No image of a reserved class is ever trained on. All images of a class that is reserved for `held_out` are
    queries and gallery, so that retrieval is also evaluated on classes that the network has never seen.

    Args:
        root: the folder that holds one folder for each split. Files such as .DS_Store and Thumbs.db are ignored.
        splits: the names of the splits in the order in which they are learned; or their number, to take the first ones in
            alphabetical order.
        image_size: height and width in pixels. The shorter side of an image is scaled to this size, and its centre is cropped.
        short_side: another length to which the shorter side is scaled before the centre is cropped, in pixels.
        channels: 1 for the mean of the colours, or 3.
        shared_classes: whether folders of the same name in several splits are one class, which comes back; by default, every
            folder is a class of its own.
        unseen_share: the share of classes that is reserved for testing, and for validation; from 0 to 0.4.
        held_out_classes: which held-out images the splits are evaluated on: those of classes that are trained on ("seen"), of
            reserved classes ("unseen"), or "both".
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing
            options.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB; 0 to decode an image each time it is used.
        seed: of the random division into training, validation and test images, and of the reserved classes.
        learned: splits that were learned before and whose data may be gone, see `LearnedSplits`; a run that is resumed gives it.

    Returns:
        Splits that are named after their folders; inputs float32 [channels, image_size, image_size] in [0, 1].

    Raises:
        UserError: a folder does not exist, a split has fewer than two classes, a class has fewer than 8 images, or a file is
            not a readable image.

    Warns:
        UserWarning: a class is empty, or files are left out.
    """
    check_division(held_out, seed, unseen_share, held_out_classes)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    if not isinstance(splits, list | tuple):
        splits = as_whole_number("splits, unless it is a list of names,", splits, 1)
    root = _checked_root(root, "a folder for every split")
    images: list[ListedImage] = []
    folders = ClassFolders()
    by_name = _split_folders(root, splits, [] if learned is None else learned.names)
    for folder in filter(None, by_name.values()):
        for label, paths in _classes_of_split(folder, folders).items():
            name = label if shared_classes else f"{folder.name}/{label}"
            images += [ListedImage(path, name, folder.name) for path in paths]
    folders.warn(root)
    return make_image_splits(
        images,
        options,
        source=root,
        held_out=held_out,
        seed=seed,
        unseen_share=unseen_share,
        held_out_classes=held_out_classes,
        split_names=list(by_name),
        learned=learned,
    )


def _checked_root(root: str | Path, holds: str) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; data.root must hold {holds}")
    return root


def _hint(folders: ClassFolders) -> str:
    """What a folder without images directly in the folders of its classes seems to be instead."""
    if any(path.is_dir() for path in folders.others):
        return "; for <root>/<split>/<class>/<image> take the data set folders"
    if folders.others:
        return "; what it holds has no suffix of an image"
    return ""


def _starts(lists: object) -> list[int]:
    starts, number = [], 0
    for one in lists:  # type: ignore[attr-defined]
        starts.append(number)
        number += len(one)
    return starts


def _split_folders(root: Path, splits: Sequence[str] | int, learned: Sequence[str]) -> dict[str, Path | None]:
    """The folders of the splits by name, those that were learned before first; None for one of these that is gone."""
    found = {path.name: path for path in entries(root) if path.is_dir()}
    in_order = [*learned, *(name for name in found if name not in learned)]
    names = in_order[:splits] if isinstance(splits, int) else list(splits)
    missing = [name for name in names if name not in in_order]
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
    return {name: found.get(name) for name in names}


def _classes_of_split(folder: Path, folders: ClassFolders) -> dict[str, list[Path]]:
    classes = folders.read(folder)
    if len(classes) < 2 or min(map(len, classes.values())) < FEWEST_IMAGES:
        raise UserError(
            f"the split {folder} must hold a folder for each of at least two classes, with at least {FEWEST_IMAGES} images "
            f"each{_few(classes)}"
        )
    return classes


def _few(classes: dict[str, list[Path]]) -> str:
    few = [name for name, paths in classes.items() if len(paths) < FEWEST_IMAGES]
    if few:
        return f"; '{shortened(printable(few[0]), 60)}' has {len(classes[few[0]])}"
    return f"; it has {len(classes)} with images"
