"""What a split teaches."""

from mas_embed.losses.metric import build, catalogue

__all__ = ["build", "catalogue"]
