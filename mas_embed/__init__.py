"""mas-embed: train embedding networks over a sequence of data splits without forgetting the earlier ones.

The public names, loaded when they are first used, so that importing the package costs little more than importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mas_embed.config import load_config as load_config
    from mas_embed.data import DATASETS as DATASETS
    from mas_embed.data import TRANSFORMS as TRANSFORMS
    from mas_embed.data import ImagePreprocessing as ImagePreprocessing
    from mas_embed.data import LearnedSplits as LearnedSplits
    from mas_embed.data import Part as Part
    from mas_embed.data import Split as Split
    from mas_embed.data import SplitSequence as SplitSequence
    from mas_embed.data import digits as digits
    from mas_embed.data import image_folder as image_folder
    from mas_embed.data import image_folders as image_folders
    from mas_embed.data import image_manifest as image_manifest
    from mas_embed.data import join_splits as join_splits
    from mas_embed.data import missing_split as missing_split
    from mas_embed.data import transform_splits as transform_splits
    from mas_embed.data import unlabeled_images as unlabeled_images
    from mas_embed.errors import RunError as RunError
    from mas_embed.errors import UserError as UserError
    from mas_embed.evaluation import EVALUATORS as EVALUATORS
    from mas_embed.evaluation import Evaluation as Evaluation
    from mas_embed.evaluation import Evaluator as Evaluator
    from mas_embed.evaluation import Results as Results
    from mas_embed.evaluation import RetrievalEvaluator as RetrievalEvaluator
    from mas_embed.evaluation import ScoreMatrix as ScoreMatrix
    from mas_embed.evaluation import SparseEvaluator as SparseEvaluator
    from mas_embed.evaluation import read_results as read_results
    from mas_embed.experiment import SavedModel as SavedModel
    from mas_embed.experiment import load_model as load_model
    from mas_embed.experiment import load_run as load_run
    from mas_embed.experiment import run_experiment as run_experiment
    from mas_embed.experiment import save_model as save_model
    from mas_embed.importance import Importance as Importance
    from mas_embed.importance import OnlineImportance as OnlineImportance
    from mas_embed.importance import Projection as Projection
    from mas_embed.importance import estimate_importance as estimate_importance
    from mas_embed.importance import estimate_local_importance as estimate_local_importance
    from mas_embed.importance import explain_coverage as explain_coverage
    from mas_embed.losses import LOSSES as LOSSES
    from mas_embed.methods import EWC as EWC
    from mas_embed.methods import IMM as IMM
    from mas_embed.methods import MAS as MAS
    from mas_embed.methods import METHODS as METHODS
    from mas_embed.methods import SI as SI
    from mas_embed.methods import ClassStatistics as ClassStatistics
    from mas_embed.methods import Combine as Combine
    from mas_embed.methods import Finetune as Finetune
    from mas_embed.methods import Frozen as Frozen
    from mas_embed.methods import Joint as Joint
    from mas_embed.methods import LocalMAS as LocalMAS
    from mas_embed.methods import LwF as LwF
    from mas_embed.methods import Method as Method
    from mas_embed.methods import Replay as Replay
    from mas_embed.methods import load_method as load_method
    from mas_embed.methods import save_method as save_method
    from mas_embed.models import MODELS as MODELS
    from mas_embed.models import PREPROCESSING as PREPROCESSING
    from mas_embed.models import EmbeddingNet as EmbeddingNet
    from mas_embed.models import small_conv as small_conv
    from mas_embed.retrieval import IndexCompatibility as IndexCompatibility
    from mas_embed.retrieval import RetrievalIndex as RetrievalIndex
    from mas_embed.retrieval import RetrievalScores as RetrievalScores
    from mas_embed.retrieval import class_means as class_means
    from mas_embed.retrieval import clustering_scores as clustering_scores
    from mas_embed.retrieval import compare_indexes as compare_indexes
    from mas_embed.retrieval import evaluate_retrieval as evaluate_retrieval
    from mas_embed.retrieval import nearest_class_mean_accuracy as nearest_class_mean_accuracy
    from mas_embed.runtime.fingerprint import fingerprint_of as fingerprint_of
    from mas_embed.runtime.forward import embed_batch as embed_batch
    from mas_embed.runtime.libraries import require_library as require_library
    from mas_embed.runtime.nested_state import flatten_state as flatten_state
    from mas_embed.runtime.nested_state import unflatten_state as unflatten_state
    from mas_embed.runtime.preprocessing import Preprocessing as Preprocessing
    from mas_embed.runtime.seeding import seeded as seeded
    from mas_embed.runtime.text_models import cls_pooling as cls_pooling
    from mas_embed.runtime.text_models import mean_pooling as mean_pooling
    from mas_embed.runtime.text_models import sentence_transformers_unnormalized as sentence_transformers_unnormalized
    from mas_embed.training import CALLBACKS as CALLBACKS
    from mas_embed.training import SAMPLERS as SAMPLERS
    from mas_embed.training import Callback as Callback
    from mas_embed.training import ProgressBar as ProgressBar
    from mas_embed.training import Recipe as Recipe
    from mas_embed.training import SequenceResult as SequenceResult
    from mas_embed.training import Tracker as Tracker
    from mas_embed.training import per_class_sampler as per_class_sampler
    from mas_embed.training import train_sequence as train_sequence
    from mas_embed.training import training_batches as training_batches

# By the module that defines them
_NAMES = {
    "importance": [
        "Importance",
        "OnlineImportance",
        "Projection",
        "estimate_importance",
        "estimate_local_importance",
        "explain_coverage",
    ],
    "methods": [
        "ClassStatistics",
        "Combine",
        "EWC",
        "Finetune",
        "Frozen",
        "IMM",
        "Joint",
        "LocalMAS",
        "LwF",
        "MAS",
        "METHODS",
        "Method",
        "Replay",
        "SI",
        "load_method",
        "save_method",
    ],
    "retrieval": [
        "IndexCompatibility",
        "RetrievalIndex",
        "RetrievalScores",
        "class_means",
        "clustering_scores",
        "compare_indexes",
        "evaluate_retrieval",
        "nearest_class_mean_accuracy",
    ],
    "evaluation": [
        "EVALUATORS",
        "Evaluation",
        "Evaluator",
        "Results",
        "RetrievalEvaluator",
        "ScoreMatrix",
        "SparseEvaluator",
        "read_results",
    ],
    "data": [
        "DATASETS",
        "ImagePreprocessing",
        "LearnedSplits",
        "Part",
        "Split",
        "SplitSequence",
        "TRANSFORMS",
        "digits",
        "image_folder",
        "image_folders",
        "image_manifest",
        "join_splits",
        "missing_split",
        "transform_splits",
        "unlabeled_images",
    ],
    "models": ["EmbeddingNet", "MODELS", "PREPROCESSING", "small_conv"],
    "losses": ["LOSSES"],
    "training": [
        "CALLBACKS",
        "Callback",
        "ProgressBar",
        "Recipe",
        "SAMPLERS",
        "SequenceResult",
        "Tracker",
        "per_class_sampler",
        "train_sequence",
        "training_batches",
    ],
    "config": ["load_config"],
    "experiment": ["SavedModel", "load_model", "load_run", "run_experiment", "save_model"],
    "errors": ["RunError", "UserError"],
    "runtime.fingerprint": ["fingerprint_of"],
    "runtime.forward": ["embed_batch"],
    "runtime.libraries": ["require_library"],
    "runtime.nested_state": ["flatten_state", "unflatten_state"],
    "runtime.preprocessing": ["Preprocessing"],
    "runtime.seeding": ["seeded"],
    "runtime.text_models": ["cls_pooling", "mean_pooling", "sentence_transformers_unnormalized"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mas_embed' has no attribute '{name}'")
    value = getattr(import_module(f"mas_embed.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
