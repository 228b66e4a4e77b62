"""Images of different sizes and numbers of channels as RGB images of one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from mas_embed.errors import UserError
from mas_embed.runtime.arrays import as_tensor

LARGEST_IN_MEMORY = 2**30  # bytes; tensors that would be larger after scaling are scaled when they are indexed
CHUNK = 1024  # images that are scaled at once


def as_rgb(images: Tensor, size: int) -> Tensor:
    """The images with three channels, their shorter sides scaled to a size (bilinear, antialiased) and their centres cropped.

    Args:
        images: [..., C, H, W] floating-point, with one channel or three.
        size: height and width of the result in pixels.

    Returns:
        [..., 3, size, size]; of images with one channel a view with three equal channels, which takes no memory for them.

    Raises:
        UserError: the images have another shape or dtype.
    """
    from torchvision.transforms.functional import center_crop, resize

    if images.ndim < 3 or images.shape[-3] not in (1, 3) or not images.is_floating_point():
        raise UserError(
            f"images must be floating-point tensors [C, H, W] with 1 or 3 channels, got {images.dtype} of shape "
            f"{list(images.shape)}"
        )
    if images.shape[-2:] != (size, size):
        images = center_crop(resize(images, [size], antialias=True), [size])
    return images.expand(*images.shape[:-3], 3, size, size)


class RGBImages:
    """Images as RGB tensors of one size, made when they are indexed: item i is image i as `as_rgb` gives it.

    Args:
        images: a sequence whose items are floating-point tensors or arrays [C, H, W].
        size: height and width in pixels.
    """

    def __init__(self, images: Any, size: int) -> None:
        self.images, self.size = images, size
        if hasattr(images, "paths"):  # by which a fingerprint tells the files
            self.paths = images.paths

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return as_rgb(as_tensor(self.images[index], "an image"), self.size)


def rgb_inputs(inputs: Any, size: int) -> Any:
    """The inputs of a part as RGB images of one size: a tensor for a tensor that then fits in memory, else `RGBImages`.

    Inputs that are joined stay apart, so that a fingerprint still tells their files.
    """
    if isinstance(inputs, ConcatDataset):
        return ConcatDataset([rgb_inputs(one, size) for one in inputs.datasets])
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return RGBImages(inputs, size)
    if len(inputs) * inputs.shape[1] * size**2 * inputs.element_size() > LARGEST_IN_MEMORY:
        return RGBImages(inputs, size)
    chunks = [as_rgb(chunk, size)[:, : inputs.shape[1]] for chunk in inputs.split(CHUNK)]
    return torch.cat(chunks).expand(-1, 3, -1, -1)
