"""Embedding networks, by name in `MODELS`."""

from mas_embed.models.embedding_net import MODELS, EmbeddingNet, small_conv

__all__ = ["MODELS", "EmbeddingNet", "small_conv"]
