"""How well a model knows each split of a sequence: evaluators, by name in `EVALUATORS`, the score matrix, typed results."""

from mas_embed.evaluation.base import (
    BEFORE_FIRST,
    EVALUATORS,
    CheckSplits,
    Evaluation,
    Evaluator,
    HasDetails,
    TrackedDetails,
    check_evaluable,
    check_same_settings,
    without_details,
)
from mas_embed.evaluation.present import begin_present, evaluate_present
from mas_embed.evaluation.results import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RESULTS_FILE,
    Candidate,
    Details,
    Results,
    RunRecord,
    Selection,
    first_mistake,
    join_results,
    read_results,
)
from mas_embed.evaluation.retrieval import RetrievalDetails, RetrievalEvaluator
from mas_embed.evaluation.score_matrix import MEASURES, ScoreMatrix
from mas_embed.evaluation.sparse import SparseEvaluator

__all__ = [
    "BEFORE_FIRST",
    "CONFIG_FILE",
    "ENVIRONMENT_FILE",
    "EVALUATORS",
    "MEASURES",
    "RESULTS_FILE",
    "Candidate",
    "CheckSplits",
    "Details",
    "Evaluation",
    "Evaluator",
    "HasDetails",
    "Results",
    "RetrievalDetails",
    "RetrievalEvaluator",
    "RunRecord",
    "ScoreMatrix",
    "Selection",
    "SparseEvaluator",
    "TrackedDetails",
    "begin_present",
    "check_evaluable",
    "check_same_settings",
    "evaluate_present",
    "first_mistake",
    "join_results",
    "read_results",
    "without_details",
]
