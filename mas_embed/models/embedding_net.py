"""Embedding networks that consist of a trunk, a head, and an optional scaling to unit length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.registry import Registry
from mas_embed.runtime.checks import as_whole_number
from mas_embed.runtime.text import shortened

MODELS = Registry("model", remembers=True)

LARGEST_SIZE = 2**31


class EmbeddingNet(nn.Module):
    """Computes `head(trunk(x))`, and scales it to unit length if `is_normalized`.

    Args:
        trunk: maps a batch of inputs to features [N, F].
        head: maps features [N, F] to embeddings [N, D].
        is_normalized: whether embeddings have unit length.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, is_normalized: bool = True) -> None:
        super().__init__()
        self.trunk, self.head, self.is_normalized = trunk, head, is_normalized

    def forward(self, inputs: Tensor) -> Tensor:
        """The embeddings [N, D]."""
        embeddings = self.unnormalized(inputs)
        return F.normalize(embeddings) if self.is_normalized else embeddings

    def unnormalized(self, inputs: Tensor) -> Tensor:
        """The embeddings [N, D] before they are scaled to unit length."""
        return self.head(self.trunk(inputs))


@MODELS.register("small_conv")
def small_conv(
    *, embedding_size: int = 32, channels: int = 1, width: int = 32, is_normalized: bool = True
) -> EmbeddingNet:
    """A convolutional embedding network for images with sides of 8 to 32 pixels.

    It has two 3x3 convolutions with 2x2 max pooling between them, average pooling to 4x4, one hidden linear layer, and a
    linear layer that gives the embedding. The number of parameters does not depend on the size of the images.

    Args:
        embedding_size: D, the size of the embeddings.
        channels: number of channels of the images.
        width: number of channels of the first convolution. The second convolution has twice as many channels, and the
            hidden layer has four times as many units.
        is_normalized: whether embeddings have unit length.

    Raises:
        UserError: a size is below 1 or above 2**31.
    """
    check_sizes(embedding_size=embedding_size, channels=channels, width=width)
    trunk = nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, 4 * width),
        nn.ReLU(),
    )
    return EmbeddingNet(trunk, nn.Linear(4 * width, embedding_size), is_normalized=is_normalized)


def check_sizes(**sizes: int) -> None:
    """Raises `UserError` unless every size, which is given by the name of its option, is from 1 to 2**31."""
    for name, value in sizes.items():
        if as_whole_number(name, value, 1) > LARGEST_SIZE:
            raise UserError(f"{name} must be at most {LARGEST_SIZE}, got {shortened(str(value), 40)}")
