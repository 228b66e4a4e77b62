"""Embedding a data set, nearest-neighbour search, exact retrieval metrics, and comparing an index across model updates."""

from mas_embed.retrieval.clustering import clustering_scores
from mas_embed.retrieval.compatibility import IndexCompatibility, IndexUpdate, compare_indexes
from mas_embed.retrieval.compensation import (
    COMPENSATIONS,
    DriftCompensation,
    ProcrustesCompensation,
    RidgeCompensation,
)
from mas_embed.retrieval.embedding import embed
from mas_embed.retrieval.index import Neighbours, RetrievalIndex
from mas_embed.retrieval.metrics import METRICS, RetrievalScores, evaluate_retrieval
from mas_embed.retrieval.search import find_nearest
from mas_embed.retrieval.similarity import DISTANCES, Distance, check_distance

__all__ = [
    "COMPENSATIONS",
    "DISTANCES",
    "METRICS",
    "Distance",
    "DriftCompensation",
    "IndexCompatibility",
    "IndexUpdate",
    "Neighbours",
    "ProcrustesCompensation",
    "RetrievalIndex",
    "RetrievalScores",
    "RidgeCompensation",
    "check_distance",
    "clustering_scores",
    "compare_indexes",
    "embed",
    "evaluate_retrieval",
    "find_nearest",
]
