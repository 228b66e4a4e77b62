"""Embedding a data set, nearest-neighbour search, exact retrieval metrics, class means, and an index across model updates."""

from mas_embed.retrieval.clustering import clustering_scores
from mas_embed.retrieval.compatibility import IndexCompatibility, IndexUpdate, compare_indexes
from mas_embed.retrieval.compensation import (
    COMPENSATIONS,
    DriftCompensation,
    ProcrustesCompensation,
    RidgeCompensation,
)
from mas_embed.retrieval.embedding import embed
from mas_embed.retrieval.exact_neighbours import NearestItems, nearest_items
from mas_embed.retrieval.index import Neighbours, RetrievalIndex
from mas_embed.retrieval.metrics import METRICS, RetrievalScores, evaluate_retrieval
from mas_embed.retrieval.nearest_mean import ClassMeans, class_means, nearest_class_mean_accuracy
from mas_embed.retrieval.search import find_nearest
from mas_embed.retrieval.similarity import DISTANCES, Distance, check_distance
from mas_embed.retrieval.small_galleries import SmallItems, score_small_galleries

__all__ = [
    "COMPENSATIONS",
    "DISTANCES",
    "METRICS",
    "ClassMeans",
    "Distance",
    "DriftCompensation",
    "IndexCompatibility",
    "IndexUpdate",
    "NearestItems",
    "Neighbours",
    "ProcrustesCompensation",
    "RetrievalIndex",
    "RetrievalScores",
    "RidgeCompensation",
    "SmallItems",
    "check_distance",
    "class_means",
    "clustering_scores",
    "compare_indexes",
    "embed",
    "evaluate_retrieval",
    "find_nearest",
    "nearest_class_mean_accuracy",
    "nearest_items",
    "score_small_galleries",
]
