"""mas-embed: train embedding networks over a sequence of data splits without forgetting the earlier ones.

The public names, loaded when they are first used, so that importing the package costs little more than importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mas_embed.config import load_config as load_config
    from mas_embed.data import Part as Part
    from mas_embed.data import Split as Split
    from mas_embed.data import digits as digits
    from mas_embed.data import join_splits as join_splits
    from mas_embed.errors import UserError as UserError
    from mas_embed.experiment import run_experiment as run_experiment
    from mas_embed.fingerprint import fingerprint_of as fingerprint_of
    from mas_embed.forgetting import ScoreMatrix as ScoreMatrix
    from mas_embed.importance import Importance as Importance
    from mas_embed.importance import OnlineImportance as OnlineImportance
    from mas_embed.importance import Projection as Projection
    from mas_embed.importance import estimate_importance as estimate_importance
    from mas_embed.importance import estimate_local_importance as estimate_local_importance
    from mas_embed.importance import explain_coverage as explain_coverage
    from mas_embed.methods import EWC as EWC
    from mas_embed.methods import IMM as IMM
    from mas_embed.methods import MAS as MAS
    from mas_embed.methods import METHODS as METHODS
    from mas_embed.methods import SI as SI
    from mas_embed.methods import ClassStatistics as ClassStatistics
    from mas_embed.methods import Combine as Combine
    from mas_embed.methods import Finetune as Finetune
    from mas_embed.methods import Frozen as Frozen
    from mas_embed.methods import LocalMAS as LocalMAS
    from mas_embed.methods import LwF as LwF
    from mas_embed.methods import Method as Method
    from mas_embed.methods import Replay as Replay
    from mas_embed.models import EmbeddingNet as EmbeddingNet
    from mas_embed.models import small_conv as small_conv
    from mas_embed.retrieval import IndexCompatibility as IndexCompatibility
    from mas_embed.retrieval import RetrievalIndex as RetrievalIndex
    from mas_embed.retrieval import RetrievalScores as RetrievalScores
    from mas_embed.retrieval import clustering_scores as clustering_scores
    from mas_embed.retrieval import compare_indexes as compare_indexes
    from mas_embed.retrieval import evaluate_retrieval as evaluate_retrieval
    from mas_embed.seeding import seeded as seeded
    from mas_embed.training import per_class_sampler as per_class_sampler
    from mas_embed.training import train_sequence as train_sequence

_HOME = {
    # importance
    "Importance": "importance",
    "OnlineImportance": "importance",
    "Projection": "importance",
    "estimate_importance": "importance",
    "estimate_local_importance": "importance",
    "explain_coverage": "importance",
    "fingerprint_of": "fingerprint",
    # methods
    "ClassStatistics": "methods",
    "Combine": "methods",
    "EWC": "methods",
    "Finetune": "methods",
    "Frozen": "methods",
    "IMM": "methods",
    "LocalMAS": "methods",
    "LwF": "methods",
    "MAS": "methods",
    "METHODS": "methods",
    "Method": "methods",
    "Replay": "methods",
    "SI": "methods",
    # retrieval and forgetting
    "IndexCompatibility": "retrieval",
    "RetrievalIndex": "retrieval",
    "RetrievalScores": "retrieval",
    "ScoreMatrix": "forgetting",
    "clustering_scores": "retrieval",
    "compare_indexes": "retrieval",
    "evaluate_retrieval": "retrieval",
    # data and models
    "EmbeddingNet": "models",
    "Part": "data",
    "Split": "data",
    "digits": "data",
    "join_splits": "data",
    "small_conv": "models",
    # training and experiments
    "UserError": "errors",
    "load_config": "config",
    "per_class_sampler": "training",
    "run_experiment": "experiment",
    "seeded": "seeding",
    "train_sequence": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mas_embed' has no attribute '{name}'")
    value = getattr(import_module(f"mas_embed.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
