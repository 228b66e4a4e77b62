"""The data set recognition: a sequence of other data sets, each of which becomes one split with classes of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_embed.data import DATASETS, HeldOut, Part, Split, SplitSequence, check_held_out, check_splits, join_splits
from mas_embed.errors import UserError, explained, unknown_name
from mas_embed.recognition.images import rgb_inputs
from mas_embed.runtime.checks import as_whole_number, shown

PROVIDES = ("classes_per_split", "class_names")
LARGEST_SIDE = 2**14  # pixels
_KEYS = ("name", "title", "join", "options")  # of an entry of `sets`; all others are options of the data set


@DATASETS.register("recognition", provides=PROVIDES)
def recognition(
    *,
    sets: Sequence[Mapping[str, Any] | str],
    image_size: int = 32,
    root: str | Path | None = None,
    held_out: HeldOut = "test",
    seed: int = 0,
) -> SplitSequence:
    """A sequence of data sets of images for object recognition; each becomes one split, or its splits are taken one by one.

    The classes of a split are the labels of its training images, renumbered so that no two splits share a label: those of the
    first split are 0, 1, ..., and those of the next split follow. All images are made RGB images of one size: the shorter side
    is scaled, the centre is cropped, and greyscale images get three equal channels. The held-out images are the queries of
    the data sets, and both queries and gallery of the result.

    Args:
        sets: the data sets in the order in which they are learned, each by name, `digits`, or with its options,
            `{name: torchvision, title: clothes, dataset: FashionMNIST, root: fashion}`. `title` names the split, by default
            as the data set. With `join: false` every split of the data set stays one; it is named by itself, after the title
            if one is given. `options: {...}` holds options that have one of these names. The options `held_out` and, unless an
            entry has its own, `seed` are passed on.
        image_size: height and width in pixels.
        root: the folder that relative paths in the option `root` of the data sets start from; None for the working directory.
        held_out: the images on which splits are evaluated: "test" for reported results, "validation" for choosing options.
        seed: of the random divisions of the data sets.

    Returns:
        Splits whose inputs are float [N, 3, image_size, image_size] tensors, or sequences of such images that are made when
        they are indexed. They provide `classes_per_split`, the number of classes of each split, and `class_names`.

    Raises:
        UserError: an entry names no data set, a data set refuses its options, two splits have one name, a held-out image is of
            a class without a training image, or the inputs of a data set are not images.

    Examples:
        >>> splits = recognition(sets=[{"name": "digits", "num_splits": 5, "join": False}], image_size=8)
        >>> splits.provides["classes_per_split"], splits[0].train.inputs.shape
        ([2, 2, 2, 2, 2], torch.Size([218, 3, 8, 8]))
    """
    check_held_out(held_out)
    as_whole_number("image_size", image_size, 1, LARGEST_SIDE)
    as_whole_number("seed", seed, 0)
    if isinstance(sets, str | Mapping) or not isinstance(sets, Sequence) or not sets:
        raise UserError(f"sets must be a list of data sets, such as [digits, {{name: ...}}], got {shown(sets)}")
    sequence: list[Split] = []
    names: list[list[str]] = []
    for index, entry in enumerate(sets):
        with explained(f"sets.{index}"):
            for split, label_names in _splits_of(entry, root=root, held_out=held_out, seed=seed):
                classes = split.train.labels.unique()
                _check_classes(split, classes)
                first = sum(map(len, names))
                sequence.append(_renumbered(split, classes, first, image_size))
                names.append(_class_names(classes, label_names))
    check_splits(sequence)
    labels_by_name: dict[str, list[int]] = {}
    for label, name in enumerate(name for of_split in names for name in of_split):
        labels_by_name.setdefault(name, []).append(label)
    provides = {"classes_per_split": [len(of_split) for of_split in names], "class_names": names}
    return SplitSequence(sequence, label_names=labels_by_name, provides=provides)


def _splits_of(
    entry: Mapping[str, Any] | str, *, root: str | Path | None, held_out: HeldOut, seed: int
) -> list[tuple[Split, dict[int, str]]]:
    """The splits that an entry stands for, with the names of labels where the data set has any."""
    fields: dict[str, Any] = {"name": entry} if isinstance(entry, str) else {}
    if isinstance(entry, Mapping):
        fields = dict(entry)
    name, title, join = fields.get("name"), fields.get("title"), fields.get("join", True)
    if not isinstance(name, str) or not isinstance(title, str | None) or not isinstance(join, bool):
        raise UserError(
            f"a data set must be a name, or {{name: ..., title: a text, join: true or false, ...}}, got {shown(entry)}"
        )
    constructor = DATASETS[name]
    inline = {key: value for key, value in fields.items() if key not in _KEYS}
    options = _completed(name, {**fields.get("options", {}), **inline}, root=root, held_out=held_out, seed=seed)
    splits = constructor(**options)
    check_splits(splits)
    label_names: dict[int, str] = {}
    for label_name, labels in (splits.label_names if isinstance(splits, SplitSequence) else {}).items():
        for label in labels:
            label_names.setdefault(label, label_name)
    if join:
        return [(join_splits(splits, title or name), label_names)]
    prefix = f"{title} " if title else ""
    return [(Split(prefix + one.name, one.train, one.query, one.gallery), label_names) for one in splits]


def _completed(
    name: str, options: dict[str, Any], *, root: str | Path | None, held_out: HeldOut, seed: int
) -> dict[str, Any]:
    """The options of a data set with those that are passed on to all.

    Raises:
        UserError: the data set does not have one of the options, needs another one, or has no validation part.
    """
    parameters = inspect.signature(DATASETS[name]).parameters
    for option in options:
        if option not in parameters:
            raise unknown_name(f"option of {name}", option, [*parameters, *_KEYS])
    if "held_out" in options:
        raise UserError("held_out is the same for all data sets; give it beside sets")
    if "held_out" in parameters:
        options["held_out"] = held_out
    elif held_out != "test":
        raise UserError(f"the data set {name} has no validation part, because it has no option held_out")
    if "seed" in parameters:
        options.setdefault("seed", seed)
    if root is not None and isinstance(options.get("root"), str | Path):
        options["root"] = str(Path(root) / options["root"])
    for parameter in parameters.values():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f"the data set {name} needs the option '{parameter.name}'")
    return options


def _check_classes(split: Split, classes: Tensor) -> None:
    """Raises `UserError` if a held-out image is of a class that is never trained on."""
    unseen = split.query.labels[~torch.isin(split.query.labels, classes)]
    if len(unseen):
        raise UserError(
            f"split '{split.name}' has held-out images of class {int(unseen[0])}, but no training image of it; recognition "
            "needs both"
        )


def _renumbered(split: Split, classes: Tensor, first_label: int, image_size: int) -> Split:
    """The split with RGB images of one size and labels from `first_label` on; its held-out images are its queries."""

    def part(items: Part) -> Part:
        labels = torch.searchsorted(classes, items.labels.contiguous()) + first_label
        augmented = None if items.augmented is None else rgb_inputs(items.augmented, image_size)
        return Part(rgb_inputs(items.inputs, image_size), labels, augmented=augmented)

    held_out = part(split.query)
    return Split(split.name, part(split.train), query=held_out, gallery=held_out)


def _class_names(classes: Tensor, label_names: Mapping[int, str]) -> list[str]:
    """A name for every class, different from the others; the label where there is no name, or behind one that is not unique."""
    names = [label_names.get(label, str(label)) for label in classes.tolist()]
    return [
        name if names.count(name) == 1 else f"{name} {label}"
        for name, label in zip(names, classes.tolist(), strict=True)
    ]
