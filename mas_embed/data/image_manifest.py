"""Lists of image files as a sequence of splits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from mas_embed.data.dealt_classes import Order, deal_classes
from mas_embed.data.image_splits import (
    HeldOutClasses,
    ImageOptions,
    ListedImage,
    check_division,
    make_image_splits,
    warn_of_small_classes,
)
from mas_embed.data.images import Unreadable, find_inside
from mas_embed.data.learned import LearnedSplits
from mas_embed.data.listed_lines import MOST_CHARACTERS
from mas_embed.data.manifest_lines import ManifestLine, check_ids, group_by_split, read_manifest, shown
from mas_embed.data.partition import HeldOut
from mas_embed.data.split import DATASETS, SplitSequence
from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_whole_number, check_choice

Period = Literal["day", "week", "month", "quarter", "year"]


@DATASETS.register("manifest")
def image_manifest(
    *,
    path: str | Path,
    root: str | Path | None = None,
    splits: list[str] | int | None = None,
    order: Order = "listed",
    periods: Period | None = None,
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
    """Images from a CSV, JSON Lines or Parquet file with one image on each line.

    The format is recognised by the end of the name: .jsonl or .ndjson, .parquet (with the extra `parquet`), and CSV for all
    others. Columns with other names than these are ignored:

    - `path` and `label`, required. Paths are relative to `root`. Images with the same label are of one class, also in different
      splits.
    - `split`: the name of the split of the image.
    - `date`: such as 2026-05-31 or 2026-05-31T14:03:00, from which `periods` makes splits.
    - `part`: "train", "validation" or "test". A class without a training image is one that is never trained on. Without this
      column, a quarter of the images of every class of a split is drawn for testing, and a fifth of the others for validation,
      at least two each where at least two remain.
    - `id`: identifies an image that is listed in several splits, so that as a query it does not find itself. Lines with the
      same id must be in different splits, and in the same part.

    The held-out images are both queries and gallery. The files are decoded when they are used, see `ImageFiles`.

    Args:
        path: of the file.
        root: the folder of the images; None for the folder of the file. No path may leave it.
        splits: the names of the splits in the order in which they are learned, or the number of splits to take; splits that are
            not named are left out. None takes all in the order of their first lines, or of time. In a list without splits, a
            number deals the classes into so many splits, see `image_folder`; None makes one split with the name "all".
        order: in which classes are dealt: "listed" for the order of their first lines, or "random".
        periods: "day", "week", "month", "quarter" or "year": a split for each such period of the column `date` that has images,
            with the name "2026-05-31", "2026-W22", "2026-05", "2026-Q2" or "2026".
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side of an image is scaled before its centre is cropped, in pixels; None for
            `image_size`.
        channels: 3 for RGB, or 1 for the mean of the colours.
        unseen_share: the share of the classes of every split that is reserved for testing, and another one for validation; not
            for a list with the column `part`.
        held_out_classes: which held-out images the splits are evaluated on: those of classes that the split trains on ("seen"),
            of other classes ("unseen"), or "both".
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing options.
            In a list with parts, of which none is "validation", a fifth of the training images of every class is drawn.
        unreadable: "error", "skip" or "unchecked", see `image_folder`.
        keep_megabytes: the memory for decoded images, in MiB; 0 to decode an image each time it is used.
        seed: of all random draws.
        learned: splits that were learned before and whose data may be gone, see `LearnedSplits`; a run that is resumed gives it.

    Returns:
        The splits; inputs float32 [channels, image_size, image_size] in [0, 1]. Labels are numbered split by split, and
        `label_names` has their names.

    Raises:
        UserError: the file cannot be read; a line lacks a value, has one that is not accepted, or names a file that does not
            exist (the message names the line); a file is no readable image; or a split does not exist, or has nothing to train
            on or to evaluate.
    """
    check_division(held_out, seed, unseen_share, held_out_classes)
    options = ImageOptions(image_size, short_side, channels, unreadable, keep_megabytes)
    path = Path(path)
    if periods is not None:
        check_choice("periods", periods, get_args(Period))
    if splits is not None and not isinstance(splits, list | tuple):
        splits = as_whole_number("splits, unless it is a list of names,", splits, 1)
    others = () if periods is None else ("date",)
    lines = list(read_manifest(path, "path", most_characters=MOST_CHARACTERS, others=others))
    if lines[0].part and unseen_share:
        raise UserError(f"{path} has parts, which say what is trained on; leave out unseen_share")
    if periods is not None:
        lines = _with_periods(lines, periods)
    known = [] if learned is None else learned.names
    by_split = _by_split(lines, splits, order, seed, path, known)
    check_ids(line._replace(split=name) for name, of_split in by_split.items() for line in of_split)
    folder = path.parent if root is None else Path(root)
    images = [
        ListedImage(
            find_inside(folder, line.value, listed_in=line.where, may_be_missing=name in known),
            line.label,
            name,
            line.part,
            line.id,
        )
        for name, of_split in by_split.items()
        for line in of_split
    ]
    _check_files(images, [line for of_split in by_split.values() for line in of_split])
    return make_image_splits(
        images,
        options,
        source=path,
        held_out=held_out,
        seed=seed,
        unseen_share=unseen_share,
        held_out_classes=held_out_classes,
        split_names=list(by_split),
        learned=learned,
    )


def _by_split(
    lines: list[ManifestLine],
    splits: Sequence[str] | int | None,
    order: Order,
    seed: int,
    path: Path,
    learned: Sequence[str],
) -> dict[str, list[ManifestLine]]:
    if not isinstance(splits, int):
        return group_by_split(lines, splits, path, learned)
    if lines[0].split:
        found = group_by_split(lines, None, path, learned)
        if len(found) < splits:
            raise UserError(f"{path} has {len(found)} splits, too few for splits={splits}")
        return dict(list(found.items())[:splits])
    if learned and splits > len(learned):
        raise UserError(
            f"splits={splits} would deal all classes of {path} anew; to append splits, give the list a column split"
        )
    positions: dict[str, list[int]] = {}
    for position, line in enumerate(lines):
        positions.setdefault(line.label, []).append(position)
    if not lines[0].part:
        warn_of_small_classes({name: len(of_class) for name, of_class in positions.items()}, path)
    by_split: dict[str, list[ManifestLine]] = {}
    for name, _, position in deal_classes(positions, splits, order=order, seed=seed, source=path):
        by_split.setdefault(name, []).append(lines[position])
    return by_split


def _check_files(images: Sequence[ListedImage], lines: Sequence[ManifestLine]) -> None:
    """Raises `UserError` for a file that is listed twice without an id that says so."""
    seen: dict[Path, int] = {}
    for position, image in enumerate(images):
        other = seen.setdefault(image.path, position)
        if other != position and (not image.id or image.id != images[other].id):
            raise UserError(
                f"{lines[position].where} lists the file of {lines[other].where} again; remove one, or give both the same id"
            )


def _with_periods(lines: Sequence[ManifestLine], period: Period) -> list[ManifestLine]:
    """The lines with the period of their date as their split, in the order of time; lines of one period as they are listed."""
    if lines[0].split:
        raise UserError(f"{lines[0].where} has a split, so that periods={period} has no use; leave one of them out")
    names = [_period(line, period) for line in lines]
    return [lines[index]._replace(split=names[index]) for index in sorted(range(len(lines)), key=names.__getitem__)]


def _period(line: ManifestLine, period: Period) -> str:
    try:
        date = datetime.fromisoformat(line.others["date"])
    except ValueError:
        raise UserError(
            f"{line.where} has the date '{shown(line.others['date'])}'; it must be like 2026-05-31 or 2026-05-31T14:03:00"
        ) from None
    year = f"{date.year:04}"
    if period == "week":
        iso_year, week, _ = date.isocalendar()
        return f"{iso_year:04}-W{week:02}"
    return {
        "day": f"{year}-{date.month:02}-{date.day:02}",
        "month": f"{year}-{date.month:02}",
        "quarter": f"{year}-Q{(date.month + 2) // 3}",
        "year": year,
    }[period]
