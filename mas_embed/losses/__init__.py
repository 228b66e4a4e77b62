"""Training losses by name in `LOSSES`, miners by name in `MINERS`, and distillation losses."""

from mas_embed.losses.distillation import embedding_distillation, similarity_distillation
from mas_embed.losses.metric_learning import LOSSES, MINERS, with_nested_components

__all__ = ["LOSSES", "MINERS", "embedding_distillation", "similarity_distillation", "with_nested_components"]
