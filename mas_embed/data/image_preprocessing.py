"""How images become the inputs of a model, as it was evaluated: what whoever serves the model has to do as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as ItemsByPosition

from mas_embed.data.images import ImageFiles
from mas_embed.data.transforms import NormalizedImages
from mas_embed.errors import UserError
from mas_embed.runtime.preprocessing import IMAGENET, Preprocessing, normalized


@dataclass(frozen=True)
class ImagePreprocessing:
    """How images become the inputs of a model, without augmentation.

    Attributes:
        channels: 3 for RGB, or 1 for the mean of the colours.
        image_size: height and width of the inputs, in pixels.
        short_side: the length to which the shorter side of an image file is scaled before its centre is cropped, in pixels;
            None where the images were not read from files.
        normalize: mean and standard deviation of every channel, with which the values in [0, 1] are normalized last; None for
            values in [0, 1].
    """

    channels: Literal[1, 3] | int
    image_size: tuple[int, int]
    short_side: int | None = None
    normalize: Preprocessing | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The inputs of the model from images [..., C, H, W] in [0, 1] that have the right size: their colours normalized."""
        shape = [self.channels, *self.image_size]
        if list(images.shape[-3:]) != shape:
            raise UserError(
                f"the model takes images of shape {shape}, got {list(images.shape)}; scale and crop them first"
            )
        return images if self.normalize is None else normalized(images, self.normalize)

    def read(self, paths: Sequence[str | Path]) -> Sequence[Tensor]:
        """Image files as inputs of the model, which are decoded when they are indexed: item i is float32 [C, H, W].

        Raises:
            UserError: the model was trained on images that were not read from files. On indexing: a file is no image.
        """
        if self.short_side is None:
            raise UserError(
                "the model was trained on images that were not read from files, so it is not known how files are scaled; pass "
                f"images of shape {[self.channels, *self.image_size]} to the preprocessing instead"
            )
        files = ImageFiles(
            [Path(path) for path in paths],
            size=self.image_size[0],
            short_side=self.short_side,
            channels=self.channels,  # type: ignore[arg-type]
            keep_megabytes=0,
        )
        return files if self.normalize is None else NormalizedImages(files, self.normalize)  # type: ignore[return-value]


def image_preprocessing(inputs: Any, normalize: Preprocessing | None = None) -> ImagePreprocessing | None:
    """How the inputs of a part were made from images; None if they are none, as texts.

    Args:
        inputs: of a part, in its clean view.
        normalize: of inputs that are a tensor, which does not say it; None for what the inputs say.
    """
    while not isinstance(inputs, ImageFiles | Tensor):
        if isinstance(inputs, NormalizedImages):
            inputs, normalize = inputs.images, inputs.preprocessing
        elif isinstance(inputs, ItemsByPosition):
            inputs = inputs.dataset
        elif isinstance(inputs, ConcatDataset):
            inputs = inputs.datasets[0]
        else:
            inputs = inputs[0] if len(inputs) else None
            if not isinstance(inputs, Tensor) or inputs.ndim != 3:
                return None
    if isinstance(inputs, ImageFiles):
        colours = IMAGENET if inputs.normalization == "imagenet" else normalize
        return ImagePreprocessing(inputs.channels, (inputs.size, inputs.size), inputs.short_side, colours)
    if inputs.ndim < 3:
        return None
    channels, height, width = inputs.shape[-3:]
    return ImagePreprocessing(channels, (height, width), None, normalize)
