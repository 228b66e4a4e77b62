"""Image files as the inputs of a part, which are decoded when they are indexed and cached in memory if they fit."""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.checks import check_at_least, check_choice
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import printable, shortened

if TYPE_CHECKING:
    from PIL import Image

Normalization = Literal["none", "imagenet"]

# Mean and standard deviation of the colours of ImageNet; torchvision's weights expect images normalized with them
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A file that does not exist under its listed name is looked for under these suffixes
ALTERNATIVE_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")

# Pillow logs what it does not like in a file; without a handler, Python prints it on the terminal
logging.getLogger("PIL").addHandler(logging.NullHandler())

LARGEST_SIDE = 2**14  # pixels of a side that images may be scaled to
LARGEST_RATIO = 16  # of the sides of an image that is scaled as a whole


class ImageFiles:
    """Image files as a sequence of RGB tensors, float32 [3, size, size]: item i is the image of file i.

    An image is scaled until its shorter side has `short_side` pixels, and its centre is cropped. Greyscale images are repeated
    in three channels, and scaled to 8 bits if they have 16. Decoded images are cached as bytes if all of them fit in memory.

    Args:
        paths: the files.
        size: height and width of the cropped images, in pixels.
        short_side: the length of the shorter side before cropping, in pixels; None for `size`.
        normalization: "none" for values in [0, 1]; "imagenet" subtracts the mean of ImageNet and divides by its standard
            deviation.
        keep_megabytes: the memory that the cache may take, in MiB. Without room for all images, none is cached; 0 turns the
            cache off.

    Raises:
        UserError: the sizes, the normalization or the memory are not accepted. On indexing: the file is not a readable image,
            or the index is no whole number.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int,
        short_side: int | None = None,
        normalization: Normalization = "none",
        keep_megabytes: int = 1024,
    ) -> None:
        short_side = size if short_side is None else short_side
        if not 1 <= size <= short_side <= LARGEST_SIDE:
            raise UserError(
                f"an image needs 1 <= size <= short_side <= {LARGEST_SIDE}, got size {size} and short_side {short_side}"
            )
        check_at_least("keep_megabytes", keep_megabytes, 0)
        check_choice("normalization", normalization, get_args(Normalization))
        self.paths, self.size, self.short_side, self.normalization = list(paths), size, short_side, normalization
        self._is_cached = 3 * size**2 * len(self.paths) <= keep_megabytes * 2**20
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            position = range(len(self))[operator.index(index)]
        except TypeError:
            raise UserError(f"image files are indexed by one whole number, got {shortened(repr(index))}") from None
        pixels = self._cache.get(position)
        if pixels is None:
            pixels = read_image(self.paths[position], size=self.size, short_side=self.short_side)
            if self._is_cached:
                self._cache[position] = pixels
        image = pixels.float() / 255
        if self.normalization == "none":
            return image
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (image - mean) / std


def read_image(path: Path, *, size: int, short_side: int) -> Tensor:
    """The centre of an image, uint8 [3, size, size], after its shorter side was scaled to `short_side` pixels.

    Raises:
        UserError: the file is missing, is truncated, or is not an image; the message names it.
    """
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    check_regular_file(path, "the image")
    with _decoding_errors_explained(path), Image.open(path) as image:
        colours = _without_far_ends(_as_eight_bits(image)).convert("RGB")
        if min(colours.size) != short_side:
            colours = resize(colours, [short_side])
        return pil_to_tensor(center_crop(colours, [size]))


@contextmanager
def _decoding_errors_explained(path: Path) -> Iterator[None]:
    """Raises every error of its body as `UserError`, because a damaged file leads to errors of many kinds; warns of nothing."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, Image.DecompressionBombError):
        raise UserError(f"cannot read the image {path}: it has too many pixels") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or "it is not an image, or it is truncated"
        raise UserError(f"cannot read the image {path}: {reason}") from None


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The image; of one whose sides have a ratio above `LARGEST_RATIO` the centre, so that scaling it needs little memory."""
    width, height = image.size
    longest = LARGEST_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """The image, scaled from 16 to 8 bits if it is a 16-bit greyscale image, whose values Pillow would clip."""
    from PIL import Image

    # Some versions of Pillow open 16-bit files of these formats as 32-bit images
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        return image
    grey = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
    return Image.fromarray(grey.round().astype(np.uint8))


def find_inside(folder: Path, link: str, *, listed_in: str) -> Path:
    """The path of a file inside a folder that a list names by its relative path.

    If the file does not exist, the same name is tried with the suffixes .png, .jpg and .jpeg, in lower and upper case.

    Args:
        folder: the folder that must hold the file. The path must not leave it, not even through a symbolic link.
        link: the relative path as it is listed, with "/" between folders.
        listed_in: where the path is listed, such as "line 3 of list.csv", for error messages.

    Raises:
        UserError: the path leads outside of the folder, or the file does not exist.
    """
    listed = PurePosixPath(link)
    path = folder / listed
    shown = shortened(printable(link))
    for candidate in (path, *(path.with_suffix(suffix) for suffix in ALTERNATIVE_SUFFIXES if path.suffix)):
        if not _is_inside(folder, candidate):
            leaves = listed.is_absolute() or ".." in listed.parts
            reason = "; give paths inside it" if leaves else " by a symbolic link; put the files themselves there"
            raise UserError(f"{listed_in} lists '{shown}', which lies outside {folder}{reason}")
        if os.path.isfile(candidate):  # False, without an error, for a name that no file can have
            return candidate
    raise UserError(f"{listed_in} lists '{shown}', but there is no such file in {folder}")


def _is_inside(folder: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # no file can have this name, neither inside nor outside
        return True
    except (OSError, RuntimeError):  # symbolic links that form a loop
        return False
