"""How well images and facts find each other in the space that they share.

N images, F facts, V size of a word vector, B queries of a block; slots are in the order subject, predicate, object. Facts are
given as vectors [F, 3, V] and weights [F, 3]; a slot of weight 0 is a wildcard. The label of an image is the row of its fact.

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
from mas_embed.retrieval.inputs import as_embeddings, as_integers, as_tensor
from mas_embed.retrieval.metrics import evaluate_retrieval

Match = Literal["same", "extending"]
FactDistance = Literal["euclidean", "cosine"]

FOUND_AT = 100
BLOCK_ELEMENTS = 2**22  # distances that are held at once
HITS_AT = (1, 5, 10)
ROUNDING = 1e-6  # of the largest number of a table: below that, a vector is what float32 makes of zero


@dataclass(frozen=True)
class FactRetrievalScores:
    """How well facts find images; means over the facts that have a relevant image, every fact counting the same.

    Attributes:
        mean_average_precision: over the full ranking, all relevant images in the denominator.
        mean_average_precision_found_at_100: the release's, over the 100 nearest images, those found in the denominator.
        by_order: mean average precision by how many slots a fact fills; orders without such a fact are left out.
        average_precision: of every fact [F], NaN for one without a relevant image.
        average_precision_found_at_100: of every fact [F], NaN for one without a relevant image.
        num_skipped: facts without a relevant image, left out of every mean.
    """

    mean_average_precision: float
    mean_average_precision_found_at_100: float
    by_order: dict[int, float]
    average_precision: NDArray[np.float64]
    average_precision_found_at_100: NDArray[np.float64]
    num_skipped: int


@dataclass(frozen=True)
class FactRecognitionScores:
    """How well images find facts; means over the images.

    Attributes:
        hits_at: by K (1, 5 and 10) the share of images that have a true fact among the K nearest: K1, K5, K10.
        mean_reciprocal_rank: of the nearest true fact.
        rank: of the nearest true fact, from 1, of every image [N].
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
    """Ranks the images for every fact, by Euclidean distance over the slots that the fact fills.

    Average precision is that of `evaluate_retrieval`: all relevant images in the denominator, equal distances as one group.
    "Found at 100" is that of the release of Aljundi et al. (2018): with h relevant images among the 100 nearest, at the
    ranks r_1 < ... < r_h, it is `1/h sum_i i / r_i`, and 0 if h = 0; among equal distances irrelevant images come first.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] integers, rows of the table of facts.
        vectors: [F, 3, V]; what a wildcard holds has no part.
        weights: [F, 3], >= 0; 0 for a wildcard.
        facts: rows of the facts that are asked for; None for all.
        match: which images are relevant to a fact: those labelled with the "same" fact, or with one "extending" it.

    Returns:
        Values in [0, 1]. A fact without a relevant image is left out and counted: given the images of one split, the means
        are over the facts of that split.

    Raises:
        UserError: shapes that do not fit, labels or facts outside the table, numbers that are not finite, negative weights,
            a fact that fills no slot, or no fact that has a relevant image.

    O(F N (V + log N)) time.

    Example:
        >>> vectors = torch.tensor([[[0.0], [0.0], [0.0]], [[1.0], [5.0], [0.0]]])
        >>> weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        >>> images = torch.tensor([[0.1, 9.0, 9.0], [0.9, 5.0, 9.0]])
        >>> evaluate_fact_retrieval(images, torch.tensor([0, 1]), vectors, weights).mean_average_precision
        1.0
    """
    _check_choices(match=(match, get_args(Match)))
    images, labels, vectors, weights = _checked(embeddings, labels, vectors, weights)
    asked = _rows_of(facts, len(vectors))
    full, found = np.full((2, len(vectors)), np.nan)
    for slots, rows in _by_filled_slots(weights, asked):
        wanted = torch.arange(len(vectors)) if match == "same" else _fillers(vectors, weights, slots)
        rows = rows[torch.isin(wanted[rows], wanted[labels])]
        if len(rows):
            queries, gallery = (values[:, slots].flatten(1) for values in (vectors[rows], images))
            scores = evaluate_retrieval(queries, wanted[rows], gallery, wanted[labels], distance="euclidean")
            full[rows.numpy()] = scores.per_query["average_precision"]
            found[rows.numpy()] = _precision_of_found(queries, wanted[rows], gallery, wanted[labels])
    return _summarised(full, found, (weights > 0).sum(1)[asked].numpy(), asked.numpy())


def evaluate_fact_recognition(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    vectors: ArrayLike | Tensor,
    weights: ArrayLike | Tensor,
    *,
    facts: ArrayLike | Tensor | None = None,
    distance: FactDistance = "cosine",
) -> FactRecognitionScores:
    """Ranks the facts for every image. True of an image are the fact that it is labelled with, and those that extend it.

    So `<person, riding>` is a hit for an image of `<person>`, but `<person>` is none for an image of `<person, riding>`, of
    which the label says more. Among equal distances facts that are not true come first. The release of Aljundi et al.
    (2018) allows the nearest of t true facts t - 1 ranks more in K1, K5 and K10; here K is K.

    Args:
        embeddings: [N, 3 V], of the images.
        labels: [N] integers, rows of the table of facts.
        vectors: [F, 3, V]; what a wildcard holds has no part.
        weights: [F, 3], >= 0; 0 for a wildcard.
        facts: rows of the facts that are searched, those of the labels among them; None for all.
        distance: "cosine" over all slots, as in the release, but wildcards are zero here (there they hold minus the mean of
            the slot's vectors); it prefers no order. The cosine of a zero embedding is 0, and so is that of a fact whose
            vector is zero up to rounding: none of its numbers is above 1e-6 of the largest of the table, as where all facts
            have one subject. Or "euclidean" over the slots that the fact fills, as in the other direction: a fact is then
            never farther than one that extends it, so that facts of order 1 come first and K1 of the others is low.

    Raises:
        UserError: shapes that do not fit, labels or facts outside the table, labels not among `facts`, numbers that are not
            finite, negative weights, or a fact that fills no slot.

    O(N F V) time.
    """
    _check_choices(distance=(distance, get_args(FactDistance)))
    images, labels, vectors, weights = _checked(embeddings, labels, vectors, weights)
    compared = _without_rounding(vectors) if distance == "cosine" else vectors
    searched = _rows_of(facts, len(vectors))
    if not bool(torch.isin(labels, searched).all()):
        raise UserError("every image's own fact must be among the facts that are searched; add the labels to facts")
    rank = torch.zeros(len(images), dtype=torch.long)
    for slots, rows in _by_filled_slots(weights, labels.unique()):
        own = _fillers(vectors, weights, slots)
        for block in torch.isin(labels, rows).nonzero()[:, 0].split(_block_size(len(searched))):
            distances = _distances_to_facts(images[block], compared[searched], weights[searched], distance)
            is_true = own[labels[block]][:, None] == own[searched]
            nearest = distances.masked_fill(~is_true, torch.inf).amin(1, keepdim=True)
            rank[block] = 1 + (~is_true & (distances <= nearest)).sum(1)
    return FactRecognitionScores(
        hits_at={k: float((rank <= k).double().mean()) for k in HITS_AT},
        mean_reciprocal_rank=float((1 / rank.double()).mean()),
        rank=rank.numpy(),
    )


def _checked(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    vectors: ArrayLike | Tensor,
    weights: ArrayLike | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 3, V], labels, facts with wildcards zero, and weights; on the CPU, in float64."""
    images = as_embeddings(embeddings, "embeddings")
    labels = as_integers(labels, "labels", len(images)).cpu()
    vectors, weights = as_tensor(vectors, "vectors"), as_tensor(weights, "weights")
    if vectors.ndim != 3 or vectors.shape[1] != 3 or weights.shape != vectors.shape[:2]:
        raise UserError(
            f"facts need vectors [F, 3, V] and weights [F, 3], got {list(vectors.shape)}, {list(weights.shape)}"
        )
    if images.shape[1] != vectors.shape[1:].numel():
        raise UserError(f"images need embeddings [N, {vectors.shape[1:].numel()}], got {list(images.shape)}")
    _check_rows_of_table("labels", labels, len(vectors))
    images, vectors, weights = (values.cpu().double() for values in (images, vectors, weights))
    if not bool((weights.isfinite() & (weights >= 0)).all() and (weights > 0).any(1).all()):
        raise UserError("the weights of facts must be finite and >= 0, and that of one slot of each fact above 0")
    vectors = vectors.masked_fill((weights == 0)[:, :, None], 0)
    if not bool(vectors.isfinite().all()):
        raise UserError("the vectors of facts contain NaN or infinite numbers")
    return images.unflatten(1, (3, -1)), labels, vectors, weights


def _rows_of(facts: ArrayLike | Tensor | None, num_facts: int) -> Tensor:
    """Rows of the table, each once, in order; all where none are given."""
    if facts is None:
        return torch.arange(num_facts)
    rows = as_integers(facts, "facts").cpu().unique()
    _check_rows_of_table("facts", rows, num_facts)
    return rows


def _check_rows_of_table(name: str, rows: Tensor, num_facts: int) -> None:
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_facts:
        raise UserError(f"{name} must be rows of the table of {num_facts} facts, got {rows.min()} to {rows.max()}")


def _by_filled_slots(weights: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Which slots are filled [3], and the rows whose facts fill just these."""
    is_filled = weights[rows] > 0
    for slots in is_filled.unique(dim=0):
        yield slots, rows[(is_filled == slots).all(1)]


def _fillers(vectors: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """What fills some slots of every fact [F]: equal numbers for equal vectors, -1 for facts that leave one empty."""
    numbers = vectors[:, slots].flatten(1).unique(dim=0, return_inverse=True)[1]
    return numbers.masked_fill((weights[:, slots] == 0).any(1), -1)


def _precision_of_found(queries: Tensor, wanted: Tensor, gallery: Tensor, given: Tensor) -> NDArray[np.float64]:
    """The average precision [Q] over the nearest images, those found in the denominator."""
    values = []
    for block in torch.arange(len(queries)).split(_block_size(len(gallery))):
        is_relevant = wanted[block, None] == given
        order = is_relevant.int().argsort(
            dim=1, stable=True
        )  # irrelevant first, which stable sorting keeps among equals
        by_rank = _distances(queries[block], gallery).gather(1, order).argsort(dim=1, stable=True)[:, :FOUND_AT]
        is_found = is_relevant.gather(1, order.gather(1, by_rank))
        num_found = is_found.cumsum(1)
        precision = num_found / torch.arange(1, is_found.shape[1] + 1, dtype=torch.float64)
        values.append((precision * is_found).sum(1) / num_found[:, -1].clamp_min(1))
    return torch.cat(values).numpy()


def _distances_to_facts(images: Tensor, vectors: Tensor, weights: Tensor, distance: FactDistance) -> Tensor:
    """From images [B, 3, V] to facts [B, F]: Euclidean over the slots that a fact fills, or the negative cosine."""
    if distance == "cosine":
        return -F.normalize(images.flatten(1)) @ F.normalize(vectors.flatten(1)).mT
    distances = images.new_zeros(len(images), len(vectors))
    for slots, rows in _by_filled_slots(weights, torch.arange(len(vectors))):
        distances[:, rows] = _distances(images[:, slots].flatten(1), vectors[rows][:, slots].flatten(1))
    return distances


def _without_rounding(vectors: Tensor) -> Tensor:
    """The vectors of facts [F, 3, V], those zero that only rounding keeps from it."""
    largest = vectors.abs().amax((1, 2), keepdim=True)
    return vectors.masked_fill(largest <= ROUNDING * largest.max(), 0)


def _distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Euclidean distances [Q, G] from the differences themselves, so that equal items are equally far."""
    return torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist")


def _block_size(num_gallery: int) -> int:
    return max(1, BLOCK_ELEMENTS // num_gallery)


def _summarised(
    full: NDArray[np.float64], found: NDArray[np.float64], orders: NDArray[np.int64], asked: NDArray[np.int64]
) -> FactRetrievalScores:
    """The means over the facts that were asked for and have a relevant image."""
    is_scored = ~np.isnan(full[asked])
    if not is_scored.any():
        raise UserError("no fact that is asked for has a relevant image")
    scored = asked[is_scored]
    return FactRetrievalScores(
        mean_average_precision=float(full[scored].mean()),
        mean_average_precision_found_at_100=float(found[scored].mean()),
        by_order={int(k): float(full[scored][orders[is_scored] == k].mean()) for k in np.unique(orders[is_scored])},
        average_precision=full,
        average_precision_found_at_100=found,
        num_skipped=int((~is_scored).sum()),
    )


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, got '{value}'")
