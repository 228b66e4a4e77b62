"""Embedding networks: a trunk that sees, a head that maps to the embedding, and a length that is fixed or free."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.registry import Registry

MODELS = Registry("model")


class EmbeddingNet(nn.Module):
    """`head(trunk(x))`, scaled to unit length if `is_normalized`.

    Args:
        trunk: maps a batch of inputs to features [N, F].
        head: maps features [N, F] to [N, D].
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
    """A convolutional embedding network for images of 8 to 32 pixels a side; its size does not depend on theirs.

    Two 3x3 convolutions with a 2x2 pooling between them, pooled to 4x4, one hidden layer, and the embedding.

    Args:
        embedding_size: D.
        channels: of the images.
        width: channels of the first convolution; the second has twice, the hidden layer four times as many.
        is_normalized: whether embeddings have unit length.
    """
    for name, value in (("embedding_size", embedding_size), ("channels", channels), ("width", width)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
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
