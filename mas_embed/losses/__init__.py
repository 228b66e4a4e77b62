"""What a split teaches."""

from mas_embed.losses.facts import FactLoss, fact_loss
from mas_embed.losses.metric import build, catalogue

__all__ = ["FactLoss", "build", "catalogue", "fact_loss"]
