"""Search, exact ranking scores, what an update does to an index, and embedding a data set."""

from mas_embed.retrieval.clustering import clustering_scores
from mas_embed.retrieval.compatibility import IndexCompatibility, compare_indexes
from mas_embed.retrieval.compensation import (
    COMPENSATIONS,
    DriftCompensation,
    ProcrustesCompensation,
    RidgeCompensation,
)
from mas_embed.retrieval.embed import embed
from mas_embed.retrieval.index import Neighbours, RetrievalIndex
from mas_embed.retrieval.metrics import RetrievalScores, evaluate_retrieval
from mas_embed.retrieval.scores import DISTANCES, Distance
from mas_embed.retrieval.search import find_nearest

__all__ = [
    "COMPENSATIONS",
    "DISTANCES",
    "Distance",
    "DriftCompensation",
    "IndexCompatibility",
    "Neighbours",
    "ProcrustesCompensation",
    "RetrievalIndex",
    "RetrievalScores",
    "RidgeCompensation",
    "clustering_scores",
    "compare_indexes",
    "embed",
    "evaluate_retrieval",
    "find_nearest",
]
