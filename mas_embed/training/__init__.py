"""The loop over splits."""

from mas_embed.training.evaluation import LabelJudge, check_splits
from mas_embed.training.fact_evaluation import FACT_METRICS, FactJudge
from mas_embed.training.loading import per_class_sampler
from mas_embed.training.sequence import SequenceResult, train_sequence

__all__ = [
    "FACT_METRICS",
    "FactJudge",
    "LabelJudge",
    "SequenceResult",
    "check_splits",
    "per_class_sampler",
    "train_sequence",
]
