"""Image files as the inputs of a part: decoded when they are asked for, and kept while they fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mas_embed.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Normalization = Literal["none", "imagenet"]

# Mean and standard deviation of the colours of ImageNet, which torchvision's weights expect
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Under which a file is looked for that is not there as listed
STAND_INS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")


class ImageFiles:
    """Image files as RGB tensors, float32 [3, size, size]: item i is the file i.

    An image is scaled until its shorter side is `short_side` pixels, and its centre is cut out; greyscale is repeated in
    three channels, and scaled to 8 bits where it has 16. What was decoded is kept as bytes if all files together fit.

    Args:
        paths: of the files.
        size: pixels a side.
        short_side: pixels of the shorter side before the centre is cut out; None for `size`.
        normalization: "none" for values in [0, 1], or "imagenet" less the mean and over the standard deviation of ImageNet.
        keep_megabytes: how much memory decoded images may take; 0 to decode every time.

    Raises:
        UserError: sizes that make no sense; when asked for an item, names the file that is no readable image.
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
        if not 1 <= size <= short_side:
            raise UserError(f"an image needs 1 <= size <= short_side, got size {size} and short_side {short_side}")
        if normalization not in get_args(Normalization):
            raise UserError(f"normalization must be 'none' or 'imagenet', got '{normalization}'")
        self.paths, self.size, self.short_side, self.normalization = list(paths), size, short_side, normalization
        self._keeps = 3 * size**2 * len(self.paths) <= keep_megabytes * 2**20
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        position = range(len(self))[index]
        pixels = self._kept.get(position)
        if pixels is None:
            pixels = read_image(self.paths[position], size=self.size, short_side=self.short_side)
            if self._keeps:
                self._kept[position] = pixels
        image = pixels.float() / 255
        if self.normalization == "none":
            return image
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (image - mean) / std


def read_image(path: Path, *, size: int, short_side: int) -> Tensor:
    """The centre of an image, uint8 [3, size, size], after its shorter side was scaled to `short_side`.

    Raises:
        UserError: names the file that is missing, truncated or no image.
    """
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    try:
        with Image.open(path) as image:
            colours = _in_eight_bits(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no image, or a truncated one"
        raise UserError(f"cannot read the image {path}: {reason}") from None
    if min(colours.size) != short_side:
        colours = resize(colours, [short_side])
    return pil_to_tensor(center_crop(colours, [size]))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or greyscale of 16 bits scaled to 8, where Pillow would clip it."""
    from PIL import Image

    # Pillow opens 16 bits of these formats, in some versions, as 32
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        return image
    grey = np.asarray(image).astype(np.float64) / 257  # 65535 is 255
    return Image.fromarray(grey.round().astype(np.uint8))


def find_inside(folder: Path, link: str, *, listed_in: str) -> Path:
    """The file that a relative link names inside a folder; a missing file may be there as .png, .jpg or .jpeg, or in capitals.

    Args:
        folder: which the file must not leave, not by a symbolic link either.
        link: as it was listed, its folders apart by "/".
        listed_in: where, for messages.

    Raises:
        UserError: the link leads outside, or to no file.
    """
    listed = PurePosixPath(link)
    path = folder / listed
    for candidate in (path, *(path.with_suffix(suffix) for suffix in STAND_INS if path.suffix)):
        if not _is_inside(folder, candidate):
            leaves = listed.is_absolute() or ".." in listed.parts
            reason = "; give paths inside it" if leaves else " by a symbolic link; put the files themselves there"
            raise UserError(f"{listed_in} lists '{link}', which lies outside {folder}{reason}")
        if os.path.isfile(candidate):  # which takes a name that no file can have for a missing one
            return candidate
    raise UserError(f"{listed_in} lists '{link}', but there is no such file in {folder}")


def _is_inside(folder: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except ValueError:  # a name that no file can have, nor one outside
        return True
    except (OSError, RuntimeError):  # a loop of links
        return False
