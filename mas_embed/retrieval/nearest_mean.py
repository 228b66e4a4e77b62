"""Class means, and classification by the nearest of them.

N items, Q queries, C classes, D embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.similarity import prepare_rows
from mas_embed.runtime.arrays import as_integers

BLOCK_ELEMENTS = 2**22  # distances in memory at once
RESOLUTION = 2.0**-34  # relative to the lengths of two vectors: distances that differ by less are equal


class ClassMeans(NamedTuple):
    """The mean embedding of every class.

    Attributes:
        labels: [C] int64, ascending.
        means: [C, D] float64.
        counts: [C] int64, the numbers of items that were averaged.
    """

    labels: Tensor
    means: Tensor
    counts: Tensor

    def merged_with(self, other: ClassMeans) -> ClassMeans:
        """The means over the items of both; a class that both have gets the mean weighted by the numbers of items."""
        labels, index = torch.cat([self.labels, other.labels]).unique(return_inverse=True)
        each = torch.cat([self.counts, other.counts])
        counts = each.new_zeros(len(labels)).index_add_(0, index, each)
        shares = (
            each.double() / counts[index]
        )  # exactly 1 for a class that only one of them has, so that its mean stays
        weighted = shares.unsqueeze(1) * torch.cat([self.means, other.means])
        return ClassMeans(
            labels, weighted.new_zeros(len(labels), weighted.shape[1]).index_add_(0, index, weighted), counts
        )


def class_means(embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> ClassMeans:
    """The mean embedding of every class, `m_c = 1/N_c sum_{n: y_n = c} z_n`, summed in float64.

    Nothing is normalised: neither the embeddings, which are taken as they are, nor the means, which are shorter than 1 even
    if all embeddings have unit length.

    Args:
        embeddings: [N, D], finite.
        labels: [N] integers.

    Returns:
        The labels [C], ascending, the means [C, D] in float64 and the numbers of items [C], on the device of the embeddings.

    Raises:
        UserError: shapes do not match, labels are not integers, or an embedding is not finite.

    Examples:
        >>> found = class_means([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]], [7, 7, 2])
        >>> found.labels.tolist(), found.means.tolist()
        ([2, 7], [[3.0, 3.0], [0.5, 0.5]])
    """
    rows = as_embeddings(embeddings, "embeddings").double()
    found, index, counts = (
        as_integers(labels, "labels", len(rows)).to(rows.device).unique(return_inverse=True, return_counts=True)
    )
    sums = rows.new_zeros(len(found), rows.shape[1]).index_add_(0, index, rows)
    return ClassMeans(found, sums / counts.unsqueeze(1), counts)


def nearest_class_mean_accuracy(
    queries: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor,
    means: ArrayLike | Tensor,
    mean_labels: ArrayLike | Tensor,
) -> float:
    """The share of queries whose nearest class mean is that of their class, among the means of all classes.

    The distance is Euclidean. Nothing is normalised: in the protocol of Yu et al., embeddings have unit length and their means
    are compared as they are. Distances are computed in float64. A query that is as near to the mean of another class as to that
    of its class counts as wrong, so that a tie never improves the accuracy and the order of the means does not matter. Distances
    from a query q count as equal if they differ by at most `2^-34 (|q| + |m|)`, where m is the mean of its class.

    Args:
        queries: [Q, D], finite.
        query_labels: [Q] integers, each of which is among `mean_labels`.
        means: [C, D], finite, such as those of `class_means`.
        mean_labels: [C] integers, all different.

    Returns:
        A share in [0, 1].

    Raises:
        UserError: shapes do not match, labels are not integers, an embedding is not finite, two means have the same label, or a
            query is of a class without a mean.

    Takes O(Q C D).

    Source: Mensink, Verbeek, Perronnin, Csurka, *Distance-Based Image Classification: Generalizing to New Classes at Near-Zero
        Cost*, TPAMI 2013, for the classifier; Yu et al., *Semantic Drift Compensation for Class-Incremental Learning*, CVPR
        2020, for its use here. Their code resolves a tie by the order of the classes.

    Examples:
        >>> nearest_class_mean_accuracy([[0.1], [0.4], [0.5]], [3, 5, 3], means=[[0.0], [1.0]], mean_labels=[3, 5])
        0.3333333333333333
    """
    is_correct = is_nearest_class_mean(queries, query_labels, means, mean_labels)
    return int(is_correct.sum()) / len(is_correct)


def is_nearest_class_mean(
    queries: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor,
    means: ArrayLike | Tensor,
    mean_labels: ArrayLike | Tensor,
) -> Tensor:
    """For every query whether its nearest class mean is that of its class, [Q] bool; see `nearest_class_mean_accuracy`."""
    given, given_means = as_embeddings(queries, "queries"), as_embeddings(means, "means")
    if given.shape[1] != given_means.shape[1] or given.device != given_means.device:
        got = [f"{rows.shape[1]} dimensions on {rows.device}" for rows in (given, given_means)]
        raise UserError(f"queries have {got[0]} and means {got[1]}; both must be of one model and on one device")
    # Both are divided by one power of two, so that no square overflows or underflows
    query_rows, mean_rows = prepare_rows(given, given_means, "euclidean")
    device, num_classes = given.device, len(given_means)
    positions = _positions_of_classes(
        as_integers(query_labels, "query_labels", len(query_rows)).to(device),
        as_integers(mean_labels, "mean_labels", num_classes).to(device),
    )
    size = max(1, BLOCK_ELEMENTS // num_classes)
    blocks = zip(query_rows.values.split(size), positions.split(size), strict=True)
    return torch.cat([_is_nearest(rows.double(), mean_rows.values.double(), index) for rows, index in blocks])


def _is_nearest(queries: Tensor, means: Tensor, positions: Tensor) -> Tensor:
    """For every query [B, D] whether the mean at its position [B] is nearer than all other means [C, D]; [B] bool."""
    distances = torch.cdist(queries, means, compute_mode="donot_use_mm_for_euclid_dist")
    column = positions.unsqueeze(1)
    to_class = distances.gather(1, column).squeeze(1)
    to_others = distances.scatter(1, column, torch.inf).amin(1)
    return to_others - to_class > RESOLUTION * (queries.norm(dim=1) + means[positions].norm(dim=1))


def _positions_of_classes(query_labels: Tensor, mean_labels: Tensor) -> Tensor:
    """The position [Q] of the mean of every query's class.

    Raises:
        UserError: two means have the same label, or a query is of a class without a mean.
    """
    ordered, order = mean_labels.sort()
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise UserError(f"mean_labels must all differ, but {int(repeated[0])} is there twice; give one mean per class")
    found = torch.searchsorted(ordered, query_labels).clamp_max(len(ordered) - 1)
    missing = query_labels[ordered[found] != query_labels]
    if len(missing):
        raise UserError(f"query_labels has the class {int(missing[0])}, which has no mean; leave out its queries")
    return order[found]
