"""Estimates how much each parameter matters to the embeddings, from unlabeled data and for any `nn.Module`."""

from mas_embed.importance.coverage import Coverage, CoverageRow, explain_coverage
from mas_embed.importance.estimate import estimate_importance
from mas_embed.importance.local import estimate_local_importance
from mas_embed.importance.online import OnlineImportance
from mas_embed.importance.outputs import Projection
from mas_embed.importance.record import Importance

__all__ = [
    "Coverage",
    "CoverageRow",
    "Importance",
    "OnlineImportance",
    "Projection",
    "estimate_importance",
    "estimate_local_importance",
    "explain_coverage",
]
