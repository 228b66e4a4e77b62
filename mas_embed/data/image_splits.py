"""From lists of image files to a sequence of splits: what all data sets of image files share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.images import LARGEST_SIDE, ImageFiles, Unreadable, readable_images
from mas_embed.data.learned import LearnedSplits
from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import Part, Split, SplitSequence, missing_split
from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number, check_at_least, check_choice, check_range
from mas_embed.runtime.text import printable, shortened

HeldOutClasses = Literal["both", "seen", "unseen"]
FEWEST_HELD_OUT = 2  # images of a class: one of them finds the other


@dataclass(frozen=True)
class ImageOptions:
    """How image files become inputs.

    Attributes:
        image_size: height and width of the inputs, in pixels.
        short_side: the length of the shorter side before the centre is cropped; None for `image_size`.
        channels: 3 for RGB, 1 for the mean of the colours.
        unreadable: what to do with files that are no readable images, see `readable_images`.
        keep_megabytes: the memory for decoded images of the whole data set, in MiB.

    Raises:
        UserError: a value is not accepted.
    """

    image_size: int
    short_side: int | None
    channels: Literal[1, 3]
    unreadable: Unreadable
    keep_megabytes: int

    def __post_init__(self) -> None:
        check_range("image_size", self.image_size, 1, LARGEST_SIDE)
        check_choice("unreadable", self.unreadable, ("error", "skip", "unchecked"))

    def files(self, paths: Sequence[Path]) -> ImageFiles:
        """The files as inputs."""
        return ImageFiles(
            paths,
            size=self.image_size,
            short_side=self.short_side,
            channels=self.channels,
            keep_megabytes=self.keep_megabytes,
        )


class ListedImage(NamedTuple):
    """An image file in a list.

    Attributes:
        path: of the file.
        label: the name of its class.
        split: the name of its split.
        part: "train", "validation", "test", "query" or "gallery"; "" for one that is drawn. The last two are parts of the test
            images, of which "query" is not in the gallery and "gallery" is no query.
        id: identifies the image in several splits; "" for an image that is in one.
    """

    path: Path
    label: str
    split: str
    part: str = ""
    id: str = ""


def make_image_splits(
    images: Sequence[ListedImage],
    options: ImageOptions,
    *,
    source: Path,
    held_out: HeldOut,
    seed: int,
    unseen_share: float = 0.0,
    held_out_classes: HeldOutClasses = "both",
    split_names: Sequence[str] | None = None,
    learned: LearnedSplits | None = None,
) -> SplitSequence:
    """The sequence of splits with these images. The files are read when they are used.

    Args:
        images: all of them; labels are numbered in their order, split by split.
        options: how files become inputs.
        source: the folder or the list that the images are from, for messages.
        held_out: "test" or "validation". The images of the other part are not used, except those of the part "train" for
            "validation" if there is no image of the part "validation" (a fifth of them is then drawn).
        seed: of all draws.
        unseen_share: the share of the classes of every split that is reserved for testing, and likewise for validation.
        held_out_classes: which of the held-out images are evaluated: those of classes that the split trains on ("seen"), those
            of other classes ("unseen"), or both.
        split_names: the order of the splits; None for the order of the images.
        learned: splits that were learned before. Labels are numbered after theirs. Such a split may have no images, and a part
            of it of which a file is missing is empty.

    Raises:
        UserError: a file is no readable image, or a split has nothing to train on or to evaluate; or classes are reserved, which
            are drawn of one split after the other, and a split has no images.
    """
    check_division(held_out, seed, unseen_share, held_out_classes)
    learned = LearnedSplits() if learned is None else learned
    files = options.files([image.path for image in images])
    gone = {index for index, one in enumerate(images) if one.split in learned.names and not one.path.is_file()}
    present = [position for position in range(len(images)) if position not in gone]
    readable = [present[index] for index in readable_images(files.at(present), options.unreadable)]
    by_split: dict[str, list[int]] = {name: [] for name in split_names or ()}
    for position in sorted({*readable, *gone}):
        by_split.setdefault(images[position].split, []).append(position)
    if unseen_share and not all(by_split.values()):
        raise UserError(
            "unseen_share draws the reserved classes of one split after the other, so the data of all splits must be there; "
            f"bring it back to {source}"
        )
    labels: dict[str, int] = learned.numbers()
    ids: dict[str, int] = {}
    generator = np.random.default_rng(seed)
    described = []
    for name, positions in by_split.items():
        listed = [images[position] for position in positions]
        numbers = torch.tensor([labels.setdefault(image.label, len(labels)) for image in listed], dtype=torch.long)
        id_numbers = torch.tensor(
            [
                ids.setdefault(image.id or f"{position} ", len(ids))
                for image, position in zip(listed, positions, strict=True)
            ],
            dtype=torch.long,
        )
        divided = _divide(listed, numbers, held_out=held_out, seed=seed) if listed else _Divided(*[numbers] * 3)
        if unseen_share:
            divided = _reserve_classes(divided, numbers, unseen_share, held_out, generator)
        divided = _choose_classes(divided, numbers, held_out_classes)
        described.append(_Described(name, positions, numbers, id_numbers, divided))
    described = _without_lonely_queries(described, list(labels), source)
    splits = []
    for one in described:
        if not one.positions and one.name in learned.names:
            splits.append(missing_split(one.name))
        else:
            _check_not_empty(one.divided, one.name, source, held_out, held_out_classes)
            splits.append(one.split(files, gone))
    return SplitSequence(splits, label_names={name: [number] for name, number in labels.items()})


def check_division(
    held_out: HeldOut, seed: int, unseen_share: float = 0.0, held_out_classes: HeldOutClasses = "both"
) -> None:
    """Raises `UserError` for options of `make_image_splits` that are not accepted; called before anything is read."""
    check_held_out(held_out)
    check_range("unseen_share", unseen_share, 0, 0.4)
    check_at_least("seed", seed, 0)
    as_whole_number("seed", seed)
    check_choice("held_out_classes", held_out_classes, ("both", "seen", "unseen"))


class _Divided(NamedTuple):
    """Sorted positions among the images of a split; query and gallery may be the same object."""

    train: Tensor
    query: Tensor
    gallery: Tensor


class _Described(NamedTuple):
    """The images of a split, by their positions among all images, and how they are divided."""

    name: str
    positions: list[int]
    labels: Tensor
    ids: Tensor
    divided: _Divided

    def split(self, files: ImageFiles, gone: Set[int]) -> Split:
        """The split; a part of which a file is gone is empty."""
        train, query, gallery = (
            torch.empty(0, dtype=torch.long)
            if gone & {self.positions[index] for index in selected.tolist()}
            else selected
            for selected in self.divided
        )
        if not len(query) or not len(gallery):
            query = gallery = torch.empty(0, dtype=torch.long)
        is_same = self.divided.gallery is self.divided.query
        queries = self.part(files, query)
        return Split(self.name, self.part(files, train), queries, queries if is_same else self.part(files, gallery))

    def part(self, files: ImageFiles, selected: Tensor) -> Part:
        """Some of the images as a part."""
        inputs = files.at([self.positions[index] for index in selected.tolist()])
        return Part(inputs, self.labels[selected], self.ids[selected])


def _without_lonely_queries(splits: list[_Described], labels: Sequence[str], source: Path) -> list[_Described]:
    """The splits without queries whose class has no other image in any gallery; these images stay in the gallery.

    Warns:
        UserWarning: there are some.
    """
    in_galleries: dict[int, set[int]] = {}
    for split in splits:
        gallery = split.divided.gallery
        for label, id_number in zip(split.labels[gallery].tolist(), split.ids[gallery].tolist(), strict=True):
            in_galleries.setdefault(label, set()).add(id_number)
    lonely: list[str] = []

    def is_answerable(label: int, id_number: int) -> bool:
        found = bool(in_galleries.get(label, set()) - {id_number})
        if not found:
            lonely.append(labels[label])
        return found

    remaining = []
    for split in splits:
        query = split.divided.query
        pairs = zip(split.labels[query].tolist(), split.ids[query].tolist(), strict=True)
        mask = torch.tensor([is_answerable(*pair) for pair in pairs], dtype=torch.bool)
        divided = split.divided if bool(mask.all()) else split.divided._replace(query=query[mask])
        remaining.append(split._replace(divided=divided))
    if lonely:
        names = ", ".join(map(_shown, lonely[:3])) + (", ..." if len(lonely) > 3 else "")
        warnings.warn(
            f"{len(lonely)} held-out images of {source} are the only ones of their class, so they are in the gallery but are no "
            f"queries: {names}",
            stacklevel=4,
        )
    return remaining


def _divide(listed: Sequence[ListedImage], labels: Tensor, *, held_out: HeldOut, seed: int) -> _Divided:
    """The division that the list gives, or a random one where it gives none."""
    parts = np.array([image.part for image in listed])
    if not any(parts):
        train, evaluated = partition(labels, held_out, seed, fewest=FEWEST_HELD_OUT)
        return _Divided(train, evaluated, evaluated)
    of_part = {name: torch.from_numpy(np.flatnonzero(parts == name)) for name in PARTS}
    if held_out == "validation":
        if len(of_part["validation"]) == 0:
            positions = of_part["train"]
            is_seen = partition(labels[positions], "validation", seed, fewest=FEWEST_HELD_OUT, has_test=True)
            train, evaluated = (positions[selected] for selected in is_seen)
            return _Divided(train, evaluated, evaluated)
        return _Divided(of_part["train"], of_part["validation"], of_part["validation"])
    tested = of_part["test"]
    query, gallery = (torch.cat([tested, of_part[name]]).sort().values for name in ("query", "gallery"))
    same = len(of_part["query"]) == len(of_part["gallery"]) == 0
    return _Divided(of_part["train"], query, query if same else gallery)


PARTS = ("train", "validation", "test", "query", "gallery")


def _reserve_classes(
    divided: _Divided, labels: Tensor, share: float, held_out: HeldOut, generator: np.random.Generator
) -> _Divided:
    """Reserves a share of the classes for testing, and one for validation; no image of either is trained on."""
    classes = labels.unique()
    number = round(share * len(classes))
    order = torch.from_numpy(generator.permutation(classes.numpy()))
    for_test, for_validation = order[:number], order[number : 2 * number]
    unseen = for_test if held_out == "test" else for_validation
    is_reserved = torch.isin(labels, torch.cat([for_test, for_validation]))
    train, evaluated = (positions[~is_reserved[positions]] for positions in (divided.train, divided.query))
    evaluated = torch.cat([evaluated, torch.isin(labels, unseen).nonzero()[:, 0]]).sort().values
    return _Divided(train, evaluated, evaluated)


def _choose_classes(divided: _Divided, labels: Tensor, held_out_classes: HeldOutClasses) -> _Divided:
    if held_out_classes == "both":
        return divided
    trained = labels[divided.train].unique()

    def chosen(positions: Tensor) -> Tensor:
        is_seen = torch.isin(labels[positions], trained)
        return positions[is_seen if held_out_classes == "seen" else ~is_seen]

    query = chosen(divided.query)
    return _Divided(divided.train, query, query if divided.gallery is divided.query else chosen(divided.gallery))


def _check_not_empty(
    divided: _Divided, name: str, source: Path, held_out: HeldOut, held_out_classes: HeldOutClasses
) -> None:
    which = "" if held_out_classes == "both" else f" of {held_out_classes} classes"
    for part, positions in (("train", divided.train), (f"{held_out}{which}", divided.query)):
        if len(positions) == 0:
            raise UserError(f"{source} has no image of the part '{part}' in the split '{_shown(name)}'; add some")


def warn_of_small_classes(sizes: Mapping[str, int], source: Path) -> None:
    """Warns of classes that are trained on but not held out, because they have too few images.

    Warns:
        UserWarning: there are some.
    """
    small = [name for name, size in sizes.items() if size < 2 * FEWEST_HELD_OUT]
    if small:
        listed = ", ".join(map(_shown, small[:3])) + (", ..." if len(small) > 3 else "")
        warnings.warn(
            f"{len(small)} of {len(sizes)} classes of {source} have fewer than {2 * FEWEST_HELD_OUT} images, so none of them is "
            f"held out: {listed}",
            stacklevel=4,
        )


def _shown(name: str) -> str:
    return shortened(printable(name), 60)
