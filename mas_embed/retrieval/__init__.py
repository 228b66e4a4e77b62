"""Search, exact ranking scores, and embedding a data set."""

from mas_embed.retrieval.embed import embed
from mas_embed.retrieval.metrics import RetrievalScores, evaluate_retrieval
from mas_embed.retrieval.search import DISTANCES, Distance, find_nearest

__all__ = ["DISTANCES", "Distance", "RetrievalScores", "embed", "evaluate_retrieval", "find_nearest"]
