"""The loop over splits."""

from mas_embed.training.evaluation import check_splits
from mas_embed.training.loading import per_class_sampler
from mas_embed.training.sequence import SequenceResult, train_sequence

__all__ = ["SequenceResult", "check_splits", "per_class_sampler", "train_sequence"]
