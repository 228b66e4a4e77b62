"""How well clusters of embeddings agree with labels."""

from __future__ import annotations

from typing import Literal

from numpy.typing import ArrayLike
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings, as_integers, unit_rows


def clustering_scores(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    distance: Literal["cosine", "euclidean"] = "cosine",
) -> dict[str, float]:
    """Groups the embeddings by k-means and says how much the groups tell about the labels, and the labels about them.

    With I the mutual information of cluster and label and H their entropies: normalised `I / mean(H, H)`, which grows with
    the number of clusters even for random ones; adjusted `(I - E[I]) / (mean(H, H) - E[I])`, E over random groupings of the
    same sizes, which does not.

    Args:
        embeddings: [N, D], finite.
        labels: [N] integers.
        num_clusters: 1 to N; None: as many as there are labels.
        seed: of the first cluster centres (k-means++).
        distance: "cosine" (rows are scaled to unit length) or "euclidean"; k-means knows no inner product.

    Returns:
        "normalized_mutual_information" in [0, 1] and "adjusted_mutual_information", at most 1 and about 0 for random groups.

    Raises:
        UserError: shapes that do not fit, embeddings that are not finite (or zero under "cosine"), another distance, or
            `num_clusters` out of range.

    O(N D num_clusters) a round of k-means, in float64.

    Source: Vinh, Epps, Bailey, *Information theoretic measures for clusterings comparison*, JMLR 2010; scikit-learn's `KMeans`
        and scores.

    Example:
        >>> scores = clustering_scores([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], [5, 5, 7, 7])
        >>> round(scores["adjusted_mutual_information"], 6)
        1.0
    """
    if distance not in ("cosine", "euclidean"):
        raise UserError(f"distance must be one of cosine, euclidean for clustering, got '{distance}'")
    rows = as_embeddings(embeddings, "embeddings")
    classes = as_integers(labels, "labels", len(rows)).cpu().numpy()
    rows = unit_rows(rows, "embeddings") if distance == "cosine" else rows.double()
    num_clusters = len(set(classes.tolist())) if num_clusters is None else num_clusters
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
