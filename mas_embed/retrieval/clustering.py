"""Metrics of how well k-means clusters of the embeddings agree with the labels."""

from __future__ import annotations

from typing import Literal

from numpy.typing import ArrayLike
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings, unit_rows
from mas_embed.runtime.arrays import as_integers
from mas_embed.runtime.checks import as_whole_number, shown


def clustering_scores(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    distance: Literal["cosine", "euclidean"] = "cosine",
) -> dict[str, float]:
    """The normalised and the adjusted mutual information between k-means clusters of the embeddings and the labels.

    I is the mutual information of clusters and labels, and H_c and H_l are their entropies. The normalised score is
    `I / mean(H_c, H_l)`; it grows with the number of clusters even if the clusters are random. The adjusted score is
    `(I - E[I]) / (mean(H_c, H_l) - E[I])`, where E is the expectation over random clusters of the same sizes; it does not
    grow with the number of clusters.

    Args:
        embeddings: [N, D], finite.
        labels: [N] integers.
        num_clusters: between 1 and N. None stands for the number of distinct labels.
        seed: seed of the initial cluster centres (k-means++).
        distance: "cosine" (rows are scaled to unit length) or "euclidean". k-means is not defined for inner products.

    Returns:
        "normalized_mutual_information", between 0 and 1, and "adjusted_mutual_information", which is at most 1 and about 0
        for random clusters.

    Raises:
        UserError: shapes do not match, an embedding is not finite (or is zero under "cosine"), the distance is not
            supported, or `num_clusters` is out of range.

    One iteration of k-means costs O(N D num_clusters), in float64.

    Source: Vinh, Epps, Bailey, *Information theoretic measures for clusterings comparison*, JMLR 2010; scikit-learn's `KMeans`
        and scores.

    Examples:
        >>> scores = clustering_scores([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], [5, 5, 7, 7])
        >>> round(scores["adjusted_mutual_information"], 6)
        1.0
    """
    if not isinstance(distance, str) or distance not in ("cosine", "euclidean"):
        raise UserError(f"distance must be one of cosine, euclidean for clustering, got {shown(distance)}")
    rows = as_embeddings(embeddings, "embeddings")
    classes = as_integers(labels, "labels", len(rows)).cpu().numpy()
    rows = unit_rows(rows, "embeddings") if distance == "cosine" else rows.double()
    seed = as_whole_number("seed", seed, 0, 2**32 - 1)  # the range of scikit-learn
    num_clusters = len(set(classes.tolist())) if num_clusters is None else as_whole_number("num_clusters", num_clusters)
    if not 1 <= num_clusters <= len(rows):
        raise UserError(
            f"num_clusters must lie between 1 and the number of embeddings, {len(rows)}, got {num_clusters}"
        )
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    clusters = KMeans(num_clusters, random_state=seed, n_init=1).fit_predict(rows.cpu().numpy())
    return {
        "normalized_mutual_information": float(normalized_mutual_info_score(classes, clusters)),
        "adjusted_mutual_information": float(adjusted_mutual_info_score(classes, clusters)),
    }
