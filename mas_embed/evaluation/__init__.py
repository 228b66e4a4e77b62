"""How well a model knows each split of a sequence: evaluators, by name in `EVALUATORS`, and the score matrix."""

from mas_embed.evaluation.base import (
    BEFORE_FIRST,
    EVALUATORS,
    CheckSplits,
    Evaluation,
    Evaluator,
    HasDetails,
    TrackedDetails,
    check_evaluable,
    without_details,
)
from mas_embed.evaluation.retrieval import RetrievalDetails, RetrievalEvaluator
from mas_embed.evaluation.score_matrix import MEASURES, ScoreMatrix
from mas_embed.evaluation.sparse import SparseEvaluator

__all__ = [
    "BEFORE_FIRST",
    "EVALUATORS",
    "MEASURES",
    "CheckSplits",
    "Evaluation",
    "Evaluator",
    "HasDetails",
    "RetrievalDetails",
    "RetrievalEvaluator",
    "ScoreMatrix",
    "SparseEvaluator",
    "TrackedDetails",
    "check_evaluable",
    "without_details",
]
