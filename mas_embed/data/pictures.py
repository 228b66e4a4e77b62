"""Items of a data set as people look at them: a small picture, or a text."""

from __future__ import annotations

import io
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from mas_embed.data.transforms import NormalizedImages
from mas_embed.runtime.preprocessing import IMAGENET, Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 64  # pixels of a thumbnail
LARGEST_PNG_SIDE = 32  # of images that a PNG holds in fewer bytes than a JPEG, and without its blur
JPEG_QUALITY = 75
LONGEST_TEXT = 300  # characters
SMALLEST_SIDE = 2  # of a tensor that is taken for an image


def picture_of(inputs: Any, index: int, preprocessing: Preprocessing | None = None) -> Image | str | None:
    """Item `index` of the inputs of a part as a picture or a text; None for an item that is neither, such as a vector.

    A picture is made of a tensor or array [C, H, W] with 1 or 3 channels: of bytes, or of numbers in [0, 1]. Images
    with normalized colours get their colours back where the normalization is known. Where it is not, numbers outside of [0, 1]
    are scaled so that the smallest is black and the largest white. Images that are loaded from files are shown as a whole,
    before they are cropped.

    Args:
        inputs: of a part.
        index: the position of the item.
        preprocessing: how the inputs were normalized, if that is not known of the inputs themselves, see `Part.preprocessing`.

    Raises:
        UserError: the item is an image file that cannot be read any more.
    """
    index = operator.index(index)
    if isinstance(inputs, ConcatDataset):
        for joined in inputs.datasets:
            if index < len(joined):  # type: ignore[arg-type]
                return picture_of(joined, index, preprocessing)
            index -= len(joined)  # type: ignore[arg-type]
    if isinstance(inputs, NormalizedImages):
        return picture_of(inputs.images, index)
    if hasattr(inputs, "picture"):  # the whole image, see `ImageFiles`
        return _as_image(inputs.picture(index), None)
    item = inputs[index]
    if isinstance(item, str):
        return item if len(item) <= LONGEST_TEXT else f"{item[: LONGEST_TEXT - 1]}…"
    if getattr(inputs, "normalization", None) == "imagenet":
        preprocessing = IMAGENET
    return _as_image(item, preprocessing)


def thumbnail_of(picture: Image) -> bytes:
    """A picture as a PNG or JPEG file whose longer side has at most 64 pixels."""
    from PIL.Image import Resampling

    small, content = picture.copy(), io.BytesIO()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Resampling.LANCZOS)
    if max(picture.size) <= LARGEST_PNG_SIDE:
        small.save(content, "PNG", optimize=True)
    else:
        small.save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue()


def _as_image(item: Any, preprocessing: Preprocessing | None) -> Image | None:
    """A tensor or array as an image; None for one that is none."""
    from PIL.Image import fromarray

    if not isinstance(item, Tensor | np.ndarray):
        return None
    values = torch.as_tensor(item).detach().cpu()
    is_image = values.ndim == 3 and values.shape[0] in (1, 3) and min(values.shape[1:]) >= SMALLEST_SIDE
    if not is_image or not (values.is_floating_point() or values.dtype == torch.uint8):
        return None
    if values.dtype != torch.uint8:
        values = (_in_unit_range(values.double(), preprocessing) * 255).round().byte()
    pixels = values.permute(1, 2, 0).numpy()
    return fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _in_unit_range(values: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    """Numbers [C, H, W] in [0, 1]."""
    if preprocessing is not None and len(preprocessing.mean) == len(values):
        mean, std = (torch.tensor(one, dtype=torch.float64)[:, None, None] for one in preprocessing)
        values = values * std + mean
    elif values.min() < 0 or values.max() > 1:
        values = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-12)
    return values.nan_to_num(0).clamp(0, 1)
