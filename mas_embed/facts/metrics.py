"""Metrics of fact learning: retrieval of the images of a fact, and recognition of the fact of an image.

N images, F facts, V size of a word vector, B images of a block, Q queries, G gallery items; slots are in the order subject,
predicate, object. Facts are given as vectors [F, 3, V] and weights [F, 3]; a slot of weight 0 is a wildcard. The label of an
image is the row of its fact.

A fact *extends* another if it fills every slot that the other fills, with the same vector: `<person, riding, horse>` extends
`<person, riding>` and `<person>`, and every fact extends itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.exact_neighbours import NearestItems, nearest_items
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.metrics import evaluate_retrieval
from mas_embed.runtime.arrays import as_integers, as_tensor

Match = Literal["same", "extending"]
FactDistance = Literal["euclidean", "cosine"]

FOUND_AT = 100
BLOCK_ELEMENTS = 2**22  # number of distances that are in memory at once
HITS_AT = (1, 5, 10)
ROUNDING = (
    1e-6  # relative to the largest number of a table: a vector without larger numbers is zero but for float32 rounding
)


@dataclass(frozen=True)
class FactRetrievalScores:
    """How well facts retrieve images. Means are over the facts that have a relevant image, and weigh every fact equally.

    Attributes:
        mean_average_precision: over the full ranking, divided by the number of all relevant images.
        mean_average_precision_found_at_100: the variant of the release, over the 100 nearest images, divided by the number of
            relevant images among them.
        by_order: mean average precision by the number of slots that a fact fills, for the numbers that occur.
        average_precision: of every fact [F]; NaN for a fact without a relevant image.
        average_precision_found_at_100: of every fact [F]; NaN for a fact without a relevant image.
        num_skipped: number of facts without a relevant image, which are left out of every mean.
    """

    mean_average_precision: float
    mean_average_precision_found_at_100: float
    by_order: dict[int, float]
    average_precision: NDArray[np.float64]
    average_precision_found_at_100: NDArray[np.float64]
    num_skipped: int


@dataclass(frozen=True)
class FactRecognitionScores:
    """How well the facts of images are recognised. Means are over the images.

    Attributes:
        hits_at: by K (1, 5 and 10) the share of images with a true fact among the K nearest facts: K1, K5, K10.
        mean_reciprocal_rank: mean of 1 / rank.
        rank: of the nearest true fact, from 1, for every image [N].
    """

    hits_at: dict[int, float]
    mean_reciprocal_rank: float
    rank: NDArray[np.int64]


def evaluate_fact_retrieval(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    vectors: ArrayLike | Tensor,
    weights: ArrayLike | Tensor,
    *,
    facts: ArrayLike | Tensor | None = None,
    match: Match = "same",
) -> FactRetrievalScores:
    """Scores of ranking the images for every fact by Euclidean distance over the slots that the fact fills.

    Average precision is that of `evaluate_retrieval`: it is divided by the number of all relevant images, and images at equal
    distances count as one group. "Found at 100" is that of the release of Aljundi et al. (2018): with h relevant images among
    the 100 nearest, at the ranks r_1 < ... < r_h, it is `1/h sum_i i / r_i`, and 0 if h = 0; among equal distances irrelevant
    images come first.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] integers, rows of the table of facts.
        vectors: [F, 3, V]; the numbers in a wildcard's slot are not used.
        weights: [F, 3], >= 0; 0 for a wildcard.
        facts: rows of the facts that are used as queries; None for all.
        match: which images are relevant to a fact: those labelled with the "same" fact, or those labelled with any fact
            "extending" it.

    Returns:
        Scores in [0, 1]. A fact without a relevant image is left out and counted. So if only the images of one split are
        given, the means are over the facts of that split.

    Raises:
        UserError: the shapes do not fit together, labels or facts are outside the table, numbers are not finite, weights are
            negative, a fact fills no slot, or no fact has a relevant image.

    It takes O(F N (V + log N)) time.

    Examples:
        >>> vectors = torch.tensor([[[0.0], [0.0], [0.0]], [[1.0], [5.0], [0.0]]])
        >>> weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> images = torch.tensor([[0.1, 9.0, 9.0], [0.9, 5.0, 9.0]])
        >>> evaluate_fact_retrieval(images, torch.tensor([0, 1]), vectors, weights).mean_average_precision
        1.0
    """
    _check_choice("match", match, get_args(Match))
    images, labels, vectors, weights = _as_checked_tensors(embeddings, labels, vectors, weights)
    queried = _as_rows(facts, len(vectors))
    full, found = np.full((2, len(vectors)), np.nan)
    for slots, rows in _by_filled_slots(weights, queried):
        # An image is relevant to a fact if the fact of its label has the same number
        match_ids = torch.arange(len(vectors)) if match == "same" else _content_ids(vectors, weights, slots)
        rows = rows[torch.isin(match_ids[rows], match_ids[labels])]
        if len(rows):
            queries, gallery = (values[:, slots].flatten(1) for values in (vectors[rows], images))
            scores = evaluate_retrieval(queries, match_ids[rows], gallery, match_ids[labels], distance="euclidean")
            full[rows.numpy()] = scores.per_query["average_precision"]
            found[rows.numpy()] = _precision_found_at_100(queries, match_ids[rows], gallery, match_ids[labels])
    return _mean_scores(full, found, (weights > 0).sum(1)[queried].numpy(), queried.numpy())


def evaluate_fact_recognition(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    vectors: ArrayLike | Tensor,
    weights: ArrayLike | Tensor,
    *,
    facts: ArrayLike | Tensor | None = None,
    distance: FactDistance = "cosine",
) -> FactRecognitionScores:
    """Scores of ranking the facts for every image. The true facts of an image are its label and the facts that extend it.

    So `<person, riding>` is a hit for an image of `<person>`, but `<person>` is not a hit for an image of `<person, riding>`,
    whose label says more. Among equal distances facts that are not true come first. The release of Aljundi et al. (2018)
    allows the nearest of t true facts t - 1 ranks more in K1, K5 and K10; here K is K.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] integers, rows of the table of facts.
        vectors: [F, 3, V]; the numbers in a wildcard's slot are not used.
        weights: [F, 3], >= 0; 0 for a wildcard.
        facts: rows of the facts that are ranked, which must include those of the labels; None for all.
        distance: "cosine" over all slots, or "euclidean" over the slots that the fact fills, as in `evaluate_fact_retrieval`.
            The cosine is that of the release, except that wildcards are zero (there they hold minus the mean of the slot's
            vectors). It favours no number of slots. The cosine of a zero embedding is 0, and so is that of a fact whose vector
            is zero up to rounding: all of its numbers are at most 1e-6 of the largest in the table, as where all facts have
            the same subject. The Euclidean distance of a fact is never larger than that of a fact which extends it, so facts
            with one slot come first and K1 is low for the others.

    Raises:
        UserError: the shapes do not fit together, labels or facts are outside the table, labels are not among `facts`, numbers
            are not finite, weights are negative, or a fact fills no slot.

    It takes O(N F V) time.
    """
    _check_choice("distance", distance, get_args(FactDistance))
    images, labels, vectors, weights = _as_checked_tensors(embeddings, labels, vectors, weights)
    compared = _without_rounding(vectors) if distance == "cosine" else vectors
    ranked = _as_rows(facts, len(vectors))
    if not bool(torch.isin(labels, ranked).all()):
        raise UserError("the fact of every image must be among the facts that are ranked; add the labels to facts")
    rank = torch.zeros(len(images), dtype=torch.long)
    for slots, rows in _by_filled_slots(weights, labels.unique()):
        content_ids = _content_ids(vectors, weights, slots)
        for block in torch.isin(labels, rows).nonzero()[:, 0].split(_block_size(len(ranked))):
            distances = _distances_to_facts(images[block], compared[ranked], weights[ranked], distance)
            is_true = content_ids[labels[block]][:, None] == content_ids[ranked]
            nearest = distances.masked_fill(~is_true, torch.inf).amin(1, keepdim=True)
            rank[block] = 1 + (~is_true & (distances <= nearest)).sum(1)
    return FactRecognitionScores(
        hits_at={k: float((rank <= k).double().mean()) for k in HITS_AT},
        mean_reciprocal_rank=float((1 / rank.double()).mean()),
        rank=rank.numpy(),
    )


def nearest_images(embeddings: Tensor, facts: Tensor, k: int, *, vectors: Tensor, weights: Tensor) -> NearestItems:
    """The k images that are nearest to each fact, by the distance of `evaluate_fact_retrieval`.

    Args:
        embeddings: [N, 3 V], of the images.
        facts: [Q] rows of the table.
        k: the number of images of a fact.
        vectors: [F, 3, V].
        weights: [F, 3], >= 0; 0 for a wildcard.
    """
    images, vectors = embeddings.cpu().double().unflatten(1, (3, -1)), vectors[facts].cpu().double()
    positions = torch.empty(len(facts), k, dtype=torch.long)
    similarities = torch.empty(len(facts), k, dtype=torch.float64)
    is_filled = weights[facts].cpu() > 0
    for slots in is_filled.unique(dim=0):
        rows = (is_filled == slots).all(1)
        queries, gallery = (values[:, slots].flatten(1) for values in (vectors[rows], images))
        positions[rows], similarities[rows] = nearest_items(queries, gallery, k, distance="euclidean")
    return NearestItems(positions, similarities)


def _as_checked_tensors(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    vectors: ArrayLike | Tensor,
    weights: ArrayLike | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The embeddings [N, 3, V], labels, vectors with zero wildcards, and weights, as tensors on the CPU; numbers in float64.

    Raises:
        UserError: they do not have the shapes and ranges that `evaluate_fact_retrieval` describes.
    """
    images = as_embeddings(embeddings, "embeddings")
    labels = as_integers(labels, "labels", len(images)).cpu()
    vectors, weights = as_tensor(vectors, "vectors"), as_tensor(weights, "weights")
    if vectors.ndim != 3 or vectors.shape[1] != 3 or weights.shape != vectors.shape[:2]:
        raise UserError(
            f"facts need vectors [F, 3, V] and weights [F, 3], got {list(vectors.shape)}, {list(weights.shape)}"
        )
    if images.shape[1] != vectors.shape[1:].numel():
        raise UserError(f"images need embeddings [N, {vectors.shape[1:].numel()}], got {list(images.shape)}")
    _check_rows("labels", labels, len(vectors))
    images, vectors, weights = (values.cpu().double() for values in (images, vectors, weights))
    if not bool((weights.isfinite() & (weights >= 0)).all() and (weights > 0).any(1).all()):
        raise UserError(
            "the weights of facts must be finite and >= 0, and every fact needs a slot with a weight above 0"
        )
    vectors = vectors.masked_fill((weights == 0)[:, :, None], 0)
    if not bool(vectors.isfinite().all()):
        raise UserError("the vectors of facts contain NaN or infinite numbers")
    return images.unflatten(1, (3, -1)), labels, vectors, weights


def _as_rows(facts: ArrayLike | Tensor | None, num_facts: int) -> Tensor:
    """The given rows of the table without duplicates, sorted; all rows for None."""
    if facts is None:
        return torch.arange(num_facts)
    rows = as_integers(facts, "facts").cpu().unique()
    _check_rows("facts", rows, num_facts)
    return rows


def _check_rows(name: str, rows: Tensor, num_facts: int) -> None:
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_facts:
        raise UserError(f"{name} must be rows of the table of {num_facts} facts, got {rows.min()} to {rows.max()}")


def _by_filled_slots(weights: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every set of filled slots [3] that occurs, with the rows whose facts fill exactly these slots."""
    is_filled = weights[rows] > 0
    for slots in is_filled.unique(dim=0):
        yield slots, rows[(is_filled == slots).all(1)]


def _content_ids(vectors: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """A number for each fact [F], equal for facts with equal vectors in the slots; -1 if the fact leaves one of them empty."""
    numbers = vectors[:, slots].flatten(1).unique(dim=0, return_inverse=True)[1]
    return numbers.masked_fill((weights[:, slots] == 0).any(1), -1)


def _precision_found_at_100(
    queries: Tensor, query_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
) -> NDArray[np.float64]:
    """The average precision [Q] over the 100 nearest items, divided by the number of relevant ones among them."""
    values = []
    for block in torch.arange(len(queries)).split(_block_size(len(gallery))):
        is_relevant = query_ids[block, None] == gallery_ids
        # Irrelevant items first: stable sorting by distance leaves them first among equal distances
        order = is_relevant.int().argsort(dim=1, stable=True)
        by_rank = _distances(queries[block], gallery).gather(1, order).argsort(dim=1, stable=True)[:, :FOUND_AT]
        is_found = is_relevant.gather(1, order.gather(1, by_rank))
        num_found = is_found.cumsum(1)
        precision = num_found / torch.arange(1, is_found.shape[1] + 1, dtype=torch.float64)
        values.append((precision * is_found).sum(1) / num_found[:, -1].clamp_min(1))
    return torch.cat(values).numpy()


def _distances_to_facts(images: Tensor, vectors: Tensor, weights: Tensor, distance: FactDistance) -> Tensor:
    """Distances of images to facts [B, F]: Euclidean over the slots that the fact fills, or the negative cosine."""
    if distance == "cosine":
        return -F.normalize(images.flatten(1)) @ F.normalize(vectors.flatten(1)).mT
    distances = images.new_zeros(len(images), len(vectors))
    for slots, rows in _by_filled_slots(weights, torch.arange(len(vectors))):
        distances[:, rows] = _distances(images[:, slots].flatten(1), vectors[rows][:, slots].flatten(1))
    return distances


def _without_rounding(vectors: Tensor) -> Tensor:
    """The vectors of facts [F, 3, V], set to zero for facts whose vectors are zero but for rounding."""
    largest = vectors.abs().amax((1, 2), keepdim=True)
    return vectors.masked_fill(largest <= ROUNDING * largest.max(), 0)


def _distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Euclidean distances [Q, G], computed from differences, so that equal items have exactly equal distances."""
    return torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist")


def _block_size(num_gallery: int) -> int:
    return max(1, BLOCK_ELEMENTS // num_gallery)


def _mean_scores(
    full: NDArray[np.float64], found: NDArray[np.float64], orders: NDArray[np.int64], queried: NDArray[np.int64]
) -> FactRetrievalScores:
    """The scores with means over those queried facts that have a relevant image.

    Args:
        full: average precision over the full ranking [F], NaN for facts without a relevant image.
        found: average precision "found at 100" [F], likewise.
        orders: number of slots that each queried fact fills.
        queried: rows of the queried facts.
    """
    is_scored = ~np.isnan(full[queried])
    if not is_scored.any():
        raise UserError("none of the queried facts has a relevant image")
    scored = queried[is_scored]
    return FactRetrievalScores(
        mean_average_precision=float(full[scored].mean()),
        mean_average_precision_found_at_100=float(found[scored].mean()),
        by_order={int(k): float(full[scored][orders[is_scored] == k].mean()) for k in np.unique(orders[is_scored])},
        average_precision=full,
        average_precision_found_at_100=found,
        num_skipped=int((~is_scored).sum()),
    )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, got '{value}'")
