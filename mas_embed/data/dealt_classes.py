"""The classes of a data set, dealt into splits."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mas_embed.data.learned import LearnedSplits
from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.checks import as_whole_number, check_choice
from mas_embed.runtime.text import printable, shortened

# The splits that classes are dealt into: their number, the classes of each, or these by the name of the split
Classes = int | list[list[str | int]] | dict[str | int, list[str | int]]
Order = Literal["listed", "random"]


def deal_classes(
    classes: Mapping[str, Sequence[int]], splits: Classes, *, order: Order = "listed", seed: int = 0, source: Path
) -> list[tuple[str, str, int]]:
    """Deals classes into splits: for every image its split, its class and its position, split by split.

    Args:
        classes: by name of a class the positions of its images.
        splits: the number of splits, into which the classes are dealt in turn of `order`, the first ones getting one more where
            they cannot be equal; or the classes of each split, by position or by name. The images of a class that is in several
            splits are dealt at random to these; classes that are in none are left out.
        order: of the classes for a number of splits: as they are listed, or random.
        seed: of random draws.
        source: where the classes are from, for messages.

    Raises:
        UserError: a class is unknown or is listed twice in a split, a split has no class, or there are fewer classes than splits.
    """
    check_choice("order", order, ("listed", "random"))
    generator = np.random.default_rng(as_whole_number("seed", seed, 0))
    named = _named_splits(list(classes), splits, order, generator, source)
    holders: dict[str, list[str]] = {}
    for split, names in named.items():
        for name in names:
            holders.setdefault(name, []).append(split)
    dealt: dict[tuple[str, str], list[int]] = {}
    for name, of_splits in holders.items():
        positions = list(classes[name])
        if len(of_splits) > 1:
            positions = generator.permutation(positions).tolist()
        for index, split in enumerate(of_splits):
            dealt[split, name] = sorted(positions[index :: len(of_splits)])
    return [
        (split, name, position) for split, names in named.items() for name in names for position in dealt[split, name]
    ]


def _named_splits(
    classes: list[str], splits: Classes, order: Order, generator: np.random.Generator, source: Path
) -> dict[str, list[str]]:
    if isinstance(splits, list | tuple):
        splits = {str(index): names for index, names in enumerate(splits, start=1)}
    if isinstance(splits, Mapping):
        return {str(split): _checked_classes(str(split), names, classes, source) for split, names in splits.items()}
    number = as_whole_number("splits, unless it lists classes,", splits, 1)
    if number > len(classes):
        raise UserError(f"{source} has {len(classes)} classes, too few for {number} splits")
    if order == "random":
        classes = [classes[index] for index in generator.permutation(len(classes))]
    chunks = np.array_split(np.arange(len(classes)), number)
    return {str(index): [classes[one] for one in chunk] for index, chunk in enumerate(chunks, start=1)}


def without_missing_classes(
    splits: Classes, classes: Iterable[str], learned: LearnedSplits | None, source: Path
) -> tuple[Classes, list[str] | None]:
    """The splits that classes are dealt into, without those learned before of which a class is gone; and the names of all.

    Raises:
        UserError: splits were appended to a number of splits, into which all classes would be dealt anew; or a class of a split
            that is gone is in another split, too, so that it is not known which images it had.
    """
    if learned is None:
        return splits, None
    if not isinstance(splits, list | tuple | Mapping):
        if splits > len(learned.names):
            raise UserError(
                f"splits={splits} would deal all classes of {source} anew; to append splits, list the classes of every split"
            )
        return splits, None
    named = splits if isinstance(splits, Mapping) else {str(index): one for index, one in enumerate(splits, start=1)}
    known, texts = set(classes), {str(name): list(map(str, of_split)) for name, of_split in named.items()}
    gone = {name for name, of_split in texts.items() if name in learned.names and not known.issuperset(of_split)}
    for name in gone:
        for other, of_split in texts.items():
            for one in of_split:
                if other != name and one in texts[name] and other not in gone:
                    raise UserError(
                        f"the class '{_shown(one)}' is in the splits '{_shown(name)}', whose data is missing, and "
                        f"'{_shown(other)}', so it is not known which of its images are new; name the class of the new images "
                        "otherwise"
                    )
    return {name: of_split for name, of_split in named.items() if str(name) not in gone}, list(texts)


def _checked_classes(split: str, names: object, classes: Iterable[str], source: Path) -> list[str]:
    known = set(classes)
    if not isinstance(names, list | tuple) or not names:
        raise UserError(
            f"the split '{_shown(split)}' must be a list of at least one class, got {shortened(repr(names))}"
        )
    texts = [unicodedata.normalize("NFC", str(name)) for name in names]
    for name in texts:
        if name not in known:
            raise unknown_name(f"class of {source}", name, known)
        if texts.count(name) > 1:
            raise UserError(f"the split '{_shown(split)}' lists the class '{_shown(name)}' twice")
    return texts


def _shown(name: str) -> str:
    return shortened(printable(name), 60)
