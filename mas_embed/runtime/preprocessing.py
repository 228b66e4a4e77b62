"""The colours that a network's weights were trained with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.checks import as_number


class Preprocessing(NamedTuple):
    """How images in [0, 1] are normalized before a network sees them: `(image - mean) / std`, channel by channel.

    Attributes:
        mean: the mean of every channel.
        std: the standard deviation of every channel, > 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Of ImageNet; torchvision's weights, and the public ones for CIFAR-10, were trained with it
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalized(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`(images - mean) / std` of images [..., C, H, W]."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in preprocessing)
    return (images - mean) / std


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Raises `UserError` unless there are as many means as deviations, all of them finite, and the deviations > 0.

    >>> check_preprocessing(Preprocessing((0.5,), (0.0,)))
    Traceback (most recent call last):
    mas_embed.errors.UserError: every std of a preprocessing must be greater than 0, got 0.0
    """
    mean, std = preprocessing
    if len(mean) != len(std) or not mean:
        raise UserError(f"a preprocessing needs as many means as deviations, got {len(mean)} and {len(std)}")
    for value in (*mean, *std):
        as_number("every mean and std of a preprocessing", value)
    if min(std) <= 0:
        raise UserError(f"every std of a preprocessing must be greater than 0, got {min(std)}")
