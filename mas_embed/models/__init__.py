"""Embedding networks, by name in `MODELS`."""

from mas_embed.models.embedding import MODELS, EmbeddingNet, small_conv
from mas_embed.models.facts import FactNet, sherlock, small_fact_conv, two_branch

__all__ = ["MODELS", "EmbeddingNet", "FactNet", "sherlock", "small_conv", "small_fact_conv", "two_branch"]
