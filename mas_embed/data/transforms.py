"""What is done to the images of a sequence of splits: random changes of what is trained on, and normalized colours of all."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mas_embed.data.split import Part, Split, SplitSequence
from mas_embed.errors import UserError, raised_by, reason_of
from mas_embed.registry import Constructor, Registry
from mas_embed.runtime.preprocessing import Preprocessing, check_preprocessing, normalized

# Those of `transforms.v2` that change one image; not those that hold others, mix a batch, change a type, or call a function
_NO_AUGMENTATIONS = {
    "ClampBoundingBoxes",
    "ClampKeyPoints",
    "Compose",
    "ConvertBoundingBoxFormat",
    "ConvertImageDtype",
    "CutMix",
    "Identity",
    "FiveCrop",
    "Lambda",
    "LinearTransformation",
    "MixUp",
    "Normalize",
    "PILToTensor",
    "RandomApply",
    "RandomChoice",
    "RandomIoUCrop",
    "RandomOrder",
    "SanitizeBoundingBoxes",
    "SanitizeKeyPoints",
    "SetClampingMode",
    "SetKeyPoints",
    "TenCrop",
    "ToDtype",
    "ToImage",
    "ToPILImage",
    "ToPureTensor",
    "ToTensor",
    "Transform",
    "UniformTemporalSubsample",
}

# an image [C, H, W], uint8 or floating-point in [0, 1] -> the same, changed at random
Transform = Callable[[Tensor], Tensor]
Normalize = Literal["weights", "data", "none"]


def _torchvision_transforms() -> Mapping[str, Constructor]:
    from torchvision.transforms import v2

    classes = {
        name: kind for name, kind in vars(v2).items() if inspect.isclass(kind) and issubclass(kind, v2.Transform)
    }
    return {name: kind for name, kind in classes.items() if name not in _NO_AUGMENTATIONS}


TRANSFORMS = Registry("transform", library=_torchvision_transforms)


class NormalizedImages:
    """Images with normalized colours as a sequence: item i is `(images[i] - mean) / std`, float32 [C, H, W].

    Args:
        images: a sequence of images [C, H, W] in [0, 1].
        preprocessing: mean and std [C].
    """

    def __init__(self, images: Any, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return normalized(self.images[index], self.preprocessing)

    def __repr__(self) -> str:
        return f"NormalizedImages({tuple(self.preprocessing)})"


class AugmentedImages:
    """The training view of images as a sequence: item i is image i, changed at random each time it is indexed.

    The transforms are called one after the other on `images.picture(i)` if the images have such a method, as `ImageFiles` do,
    which gives the image before it is cropped; else on `images[i]`. They must end with the shape of `images[i]`.

    Args:
        images: a sequence of images [C, H, W] in [0, 1].
        transforms: each `image -> image`, such as those of `torchvision.transforms.v2`, which draw from torch's global
            generator.

    Raises:
        UserError: on indexing, if a transform fails, or if an image has another shape in the end.
    """

    def __init__(self, images: Any, transforms: Sequence[Transform]) -> None:
        self.images, self.transforms = images, list(transforms)
        self._shape = image_shape(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images.picture(index) if hasattr(self.images, "picture") else self.images[index]
        with raised_by("transforms"):
            for transform in self.transforms:
                image = _call(transform, image)
            if not isinstance(image, Tensor) or image.shape != self._shape:
                got = list(image.shape) if isinstance(image, Tensor) else f"a {type(image).__name__}"
                raise UserError(
                    f"augmented images must have the shape {list(self._shape)} of the others, got {got}; crop them to it, as "
                    "RandomResizedCrop does"
                )
        return image.float() / 255 if image.dtype == torch.uint8 else image

    def __repr__(self) -> str:
        return f"AugmentedImages({self.transforms})"


def _call(transform: Transform, image: Tensor) -> Tensor:
    try:
        return transform(image)
    except UserError:
        raise
    except Exception as error:
        name = getattr(transform, "__name__", type(transform).__name__)
        raise UserError(f"{name} fails on an image of shape {list(image.shape)}: {reason_of(error)}") from error


def transform_splits(
    splits: Sequence[Split],
    *,
    augment: Sequence[Transform] = (),
    normalize: Preprocessing | Literal["data"] | None = None,
) -> Sequence[Split]:
    """The same splits with a training view that is augmented, and with normalized colours in both views.

    Splits are returned as they are if there is nothing to do.

    Args:
        splits: whose inputs are images [C, H, W] in [0, 1].
        augment: transforms that change an image at random, see `AugmentedImages`. Parts that are evaluated are not augmented.
        normalize: mean and std of every channel; "data" to compute them from the training images of the first split, before
            they are augmented; None to leave the colours.

    Raises:
        UserError: the inputs are no images, the number of channels is another, or the first split has a channel of one value.

    Examples:
        >>> from torchvision.transforms import v2
        >>> from mas_embed.data import digits
        >>> splits = transform_splits(digits(), augment=[v2.RandomCrop(8, padding=1)], normalize="data")
        >>> abs(float(splits[0].train.inputs.mean())) < 1e-5
        True
    """
    if not augment and normalize is None:
        return splits
    present = next(split for split in splits if len(split.train))
    shape = image_shape(present.train.inputs)
    preprocessing = _channel_statistics(present.train.inputs) if normalize == "data" else normalize
    if preprocessing is not None:
        check_preprocessing(preprocessing)
        if len(preprocessing.mean) != shape[0]:
            raise UserError(
                f"colours are to be normalized in {len(preprocessing.mean)} channels, but the images have {shape[0]}; "
                "read them with as many channels, or choose another normalization"
            )
    done: dict[int, Part] = {}  # a query that is the gallery stays so

    def transformed(part: Part, *, augment: Sequence[Transform]) -> Part:
        if id(part) not in done:
            done[id(part)] = _transform_part(part, augment, preprocessing)
        return done[id(part)]

    sequence = copy.copy(splits) if isinstance(splits, SplitSequence) else SplitSequence(splits)
    sequence.normalization = preprocessing
    sequence[:] = [
        Split(
            split.name,
            _transform_part(split.train, augment, preprocessing),
            transformed(split.query, augment=()),
            transformed(split.gallery, augment=()),
        )
        for split in splits
    ]
    return sequence


def _transform_part(part: Part, augment: Sequence[Transform], preprocessing: Preprocessing | None) -> Part:
    if not len(part):
        return part
    augmented = part.augmented
    if augment:
        augmented = AugmentedImages(part.inputs if augmented is None else augmented, augment)
    if preprocessing is not None:
        augmented = None if augmented is None else NormalizedImages(augmented, preprocessing)
        is_tensor = isinstance(part.inputs, Tensor)
        images = normalized(part.inputs, preprocessing) if is_tensor else NormalizedImages(part.inputs, preprocessing)
        return Part(images, part.labels, part.ids, augmented, preprocessing)
    return Part(part.inputs, part.labels, part.ids, augmented)


def image_shape(images: Any) -> torch.Size:
    """The shape [C, H, W] of the first image; raises `UserError` if it is none."""
    first = images[0]
    if not isinstance(first, Tensor) or first.ndim != 3 or not first.is_floating_point():
        got = (
            f"{first.dtype} of shape {list(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        )
        raise UserError(f"transforms take images, floating-point tensors [C, H, W] in [0, 1]; the data set has {got}")
    return first.shape


def _channel_statistics(images: Any) -> Preprocessing:
    """Mean and standard deviation of every channel over all pixels of images [C, H, W]; in float64.

    The sums of squares are taken around the first image's mean, so that no digits are lost where the deviation is small.
    """
    centre = images[0].double().mean((1, 2), keepdim=True)
    total = torch.zeros_like(centre)
    squares = torch.zeros_like(centre)
    num_pixels = 0
    for index in range(len(images)):
        shifted = images[index].double() - centre
        total += shifted.sum((1, 2), keepdim=True)
        squares += shifted.square().sum((1, 2), keepdim=True)
        num_pixels += shifted[0].numel()
    mean = total / num_pixels
    std = (squares / num_pixels - mean.square()).clamp(min=0).sqrt()
    if float(std.min()) < 1e-6:
        raise UserError(
            f"channel {int(std.argmin())} has one value in all training images of the first split, so its colours cannot be "
            "normalized by data; choose normalize=none"
        )
    return Preprocessing(tuple((centre + mean).flatten().tolist()), tuple(std.flatten().tolist()))
