"""Image files as the inputs of a part, which are decoded when they are indexed and cached in memory as far as they fit."""

from __future__ import annotations

import copy
import logging
import operator
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import Tensor

from mas_embed.data.image_cache import ImageCache
from mas_embed.errors import UserError
from mas_embed.runtime.checks import check_at_least, check_choice
from mas_embed.runtime.preprocessing import IMAGENET, normalized
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import printable, shortened

if TYPE_CHECKING:
    from PIL import Image

Normalization = Literal["none", "imagenet"]

# A file that does not exist under its listed name is looked for under these suffixes
ALTERNATIVE_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")

# Pillow logs what it does not like in a file; without a handler, Python prints it on the terminal
logging.getLogger("PIL").addHandler(logging.NullHandler())

LARGEST_SIDE = 2**14  # pixels of a side that images may be scaled to
LARGEST_RATIO = 16  # of the sides of an image that is scaled as a whole
NUM_THREADS = min(4, os.cpu_count() or 1)  # that decode images when a data set is read
_ORIENTATION = 0x0112  # the EXIF tag
_DECODED: set[Any] = set()  # path, size and time of files that were decoded without an error

Unreadable = Literal["error", "skip", "unchecked"]


class ImageFiles:
    """Image files as a sequence of tensors, float32 [C, size, size] in [0, 1]: item i is the image of file i.

    An image is turned upright as its EXIF orientation says, and scaled until its shorter side has `short_side` pixels; its
    centre is cropped. All become RGB: greyscale is repeated in three channels, and scaled to 8 bits if it has 16; CMYK and
    palettes are converted; transparency is dropped. Decoded images are cached as bytes until the cache is full. Worker
    processes that are forked share the cache.

    Args:
        paths: the files.
        size: height and width of the cropped images, in pixels.
        short_side: the length of the shorter side before cropping, in pixels; None for `size`.
        channels: 3 for RGB, or 1 for the mean of the colours.
        normalization: "none" for values in [0, 1]; "imagenet" subtracts the mean of ImageNet and divides by its standard
            deviation.
        keep_megabytes: the memory that the cache may take, in MiB; 0 turns it off.

    Raises:
        UserError: the sizes, the channels, the normalization or the memory are not accepted. On indexing: the file is not a
            readable image, or the index is no whole number.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int,
        short_side: int | None = None,
        channels: Literal[1, 3] = 3,
        normalization: Normalization = "none",
        keep_megabytes: int = 1024,
    ) -> None:
        short_side = size if short_side is None else short_side
        if not 1 <= size <= short_side <= LARGEST_SIDE:
            raise UserError(
                f"an image needs 1 <= size <= short_side <= {LARGEST_SIDE}, got size {size} and short_side {short_side}"
            )
        if channels not in (1, 3):
            raise UserError(f"channels must be 1 or 3, got {channels!r}")
        check_choice("normalization", normalization, get_args(Normalization))
        self.paths, self.size, self.short_side, self.channels = list(paths), size, short_side, channels
        self.normalization = normalization
        check_at_least("keep_megabytes", keep_megabytes, 0)
        most_bytes = len(self.paths) * 3 * short_side**2 * LARGEST_RATIO
        self._cache = ImageCache(len(self.paths), int(min(keep_megabytes * 2**20, most_bytes)))
        self._numbers = list(range(len(self.paths)))  # in the cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self._pixels(index)
        top, left = (round((side - self.size) / 2) for side in pixels.shape[1:])
        image = self._in_channels(pixels[:, top : top + self.size, left : left + self.size].float() / 255)
        if self.normalization == "none":
            return image
        return normalized(image, IMAGENET)

    def picture(self, index: int) -> Tensor:
        """The image before it is cropped, from which a random crop is taken: [C, H, W], uint8 if it has three channels.

        With one channel it is float32 in [0, 1].
        """
        pixels = self._pixels(index)
        return pixels.clone() if self.channels == 3 else self._in_channels(pixels.float() / 255)

    def at(self, positions: Sequence[int]) -> ImageFiles:
        """The files at some positions, with the same options and the same cache."""
        files = copy.copy(self)
        files.paths = [self.paths[position] for position in positions]
        files._numbers = [self._numbers[position] for position in positions]
        return files

    def of_files(self, paths: Sequence[Path], *, keep_megabytes: int = 1024) -> ImageFiles:
        """Other files, prepared in the same way, with a cache of their own."""
        return ImageFiles(
            paths,
            size=self.size,
            short_side=self.short_side,
            channels=self.channels,
            normalization=self.normalization,
            keep_megabytes=keep_megabytes,
        )

    def _pixels(self, index: int) -> Tensor:
        """The image before it is cropped, uint8 [3, H, W]."""
        try:
            position = range(len(self))[operator.index(index)]
        except TypeError:
            raise UserError(f"image files are indexed by one whole number, got {shortened(repr(index))}") from None
        pixels = self._cache.get(self._numbers[position])
        if pixels is None:
            pixels = read_scaled_image(self.paths[position], short_side=self.short_side)
            self._cache.store(self._numbers[position], pixels)
        return pixels

    def _in_channels(self, image: Tensor) -> Tensor:
        return image.mean(0, keepdim=True) if self.channels == 1 else image


def read_scaled_image(path: Path, *, short_side: int) -> Tensor:
    """An image in RGB, upright, uint8 [3, H, W], its shorter side scaled to `short_side` pixels.

    Raises:
        UserError: the file is missing, is truncated, or is not an image; the message names it.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor, resize

    check_regular_file(path, "the image")
    with _decoding_errors_explained(path), Image.open(path) as image:
        colours = _without_far_ends(_upright(_as_eight_bits(image))).convert("RGB")
        if min(colours.size) != short_side:
            colours = resize(colours, [short_side])
        pixels: Tensor = pil_to_tensor(colours)
        return pixels


def readable_images(files: ImageFiles, unreadable: Unreadable) -> list[int]:
    """The positions of the files that are readable images. Decodes all of them, in several threads, and fills the cache.

    A file of the same name, size and time that was decoded before in this process is not decoded again.

    Args:
        files: the files.
        unreadable: "error" to raise an error for the first one that is no readable image; "skip" to warn and leave it out;
            "unchecked" to decode nothing, so that an error is raised when the image is first used.

    Raises:
        UserError: a file is no readable image; the message names it.

    Warns:
        UserWarning: files are left out.
    """
    check_choice("unreadable", unreadable, get_args(Unreadable))
    if unreadable == "unchecked":
        return list(range(len(files)))
    # The filters of warnings belong to the process: threads that change them at once would leave them changed
    with warnings.catch_warnings(), ThreadPoolExecutor(NUM_THREADS) as threads:
        mistakes = list(threads.map(lambda position: _mistake(files, position), range(len(files))))
    found = [mistake for mistake in mistakes if mistake is not None]
    if found and unreadable == "error":
        further = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{further}; remove it, or leave such files out by unreadable=skip")
    if found:
        warnings.warn(
            f"{len(found)} of {len(files)} images are left out because they are unreadable: {found[0]}"
            + (", ..." if len(found) > 1 else ""),
            stacklevel=4,
        )
    return [position for position, mistake in enumerate(mistakes) if mistake is None]


def _mistake(files: ImageFiles, position: int) -> UserError | None:
    path = files.paths[position]
    try:
        status = os.stat(path)
        key = (str(path), status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        key = None
    if key in _DECODED:
        return None
    try:
        files._pixels(position)
    except UserError as error:
        return error
    if key is not None:
        _DECODED.add(key)
    return None


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


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; unchanged without one that is readable."""
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged description of the image says nothing about its pixels
        return image
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


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


def find_inside(folder: Path, link: str, *, listed_in: str, may_be_missing: bool = False) -> Path:
    """The path of a file inside a folder that a list names by its relative path.

    If the file does not exist, the same name is tried with the suffixes .png, .jpg and .jpeg, in lower and upper case, and with
    its accents and umlauts written in the other ways that Unicode has.

    Args:
        folder: the folder that must hold the file. The path must not leave it, not even through a symbolic link.
        link: the relative path as it is listed, with "/" between folders.
        listed_in: where the path is listed, such as "line 3 of list.csv", for error messages.
        may_be_missing: whether the path of a file that does not exist is returned as it is listed.

    Raises:
        UserError: the path leads outside of the folder, or the file does not exist.
    """
    listed = PurePosixPath(link)
    path = folder / listed
    shown = shortened(printable(link))
    spellings = [path, *(folder / unicodedata.normalize(form, link) for form in ("NFC", "NFD"))]
    for candidate in (*spellings, *(path.with_suffix(suffix) for suffix in ALTERNATIVE_SUFFIXES if path.suffix)):
        if not _is_inside(folder, candidate):
            leaves = listed.is_absolute() or ".." in listed.parts
            reason = "; give paths inside it" if leaves else " by a symbolic link; put the files themselves there"
            raise UserError(f"{listed_in} lists '{shown}', which lies outside {folder}{reason}")
        if os.path.isfile(candidate):  # False, without an error, for a name that no file can have
            return candidate
    if may_be_missing:
        return path
    raise UserError(f"{listed_in} lists '{shown}', but there is no such file in {folder}")


def _is_inside(folder: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # no file can have this name, neither inside nor outside
        return True
    except (OSError, RuntimeError):  # symbolic links that form a loop
        return False
