"""Compares retrieval before and after a model update, to decide whether the stored gallery must be embedded again.

Q queries, G gallery items, K neighbours, M items that compensations are fitted on, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.compensation import COMPENSATIONS, Compensation
from mas_embed.retrieval.inputs import ROWS_AT_ONCE, as_embeddings, share_in_common, unit_rows
from mas_embed.retrieval.metrics import RetrievalScores, evaluate_transformed_gallery
from mas_embed.retrieval.search import find_nearest
from mas_embed.retrieval.similarity import Distance, Transform
from mas_embed.runtime.arrays import as_integers, as_tensor
from mas_embed.runtime.checks import as_number, as_whole_number, shown

Verdict = Literal["keep", "compensate", "re-embed"]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Drift:
    """How far the items of a gallery moved in the embedding space.

    Attributes:
        mean: the mean drift over the items.
        quantiles: the quantiles of the drift over the items, by their level ("0.05" to "0.95").
    """

    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class IndexUpdate:
    """The effect of one model update on an existing index: an `IndexCompatibility` without its arrays, ready for JSON.

    Attributes:
        after: the name of the update.
        old_on_old: the metrics by name, for old queries on the old gallery.
        new_on_new: the metrics by name, for new queries on the new gallery.
        new_on_old: the metrics by name, for new queries on the old gallery.
        compensated: by the name of the compensation, the metrics of new queries on the old gallery after compensation.
        drift: how far the gallery items moved.
        k: the number of neighbours that `churn` and `churn_re_embedded` compare.
        churn: the mean share of a query's k nearest items (old query, old gallery) that the new query no longer finds on
            the old gallery.
        churn_re_embedded: the mean share of the same k nearest items that the new query no longer finds on the new gallery.
        verdict: "keep", "compensate" or "re-embed".
        compensation: the name of the best compensation; None if none was tried.
        reason: one sentence that explains the verdict.
    """

    after: str
    old_on_old: dict[str, float]
    new_on_new: dict[str, float]
    new_on_old: dict[str, float]
    compensated: dict[str, dict[str, float]]
    drift: Drift
    k: int
    churn: float
    churn_re_embedded: float
    verdict: Verdict
    compensation: str | None
    reason: str


@dataclass(frozen=True)
class IndexCompatibility:
    """The retrieval scores of a new model's queries on an old model's gallery, and the verdict on that gallery.

    Attributes:
        old: the scores of old queries on the old gallery, which is the state before the update.
        new: the scores of new queries on the new gallery, which is the state after embedding the gallery again.
        mixed: the scores of new queries on the old gallery.
        compensated: by the name of the compensation, the scores of new queries on the old gallery after compensation.
        drift: [G] the distance that each gallery item moved: 1 - cosine under "cosine", else the Euclidean distance.
        churn: the mean share of a query's k nearest items (old query, old gallery) that the new query no longer finds on
            the old gallery.
        churn_re_embedded: the mean share of the same k nearest items that the new query no longer finds on the new gallery.
        k: the number of neighbours that `churn` and `churn_re_embedded` compare.
        tolerance: the difference in mean average precision that the verdict accepts.
        verdict: "keep", "compensate" or "re-embed", by the rule in `compare_indexes`.
        compensation: the name of the compensation with the highest mean average precision; None if none was tried.
        reason: one sentence that explains the verdict with the numbers it depends on.
    """

    old: RetrievalScores
    new: RetrievalScores
    mixed: RetrievalScores
    compensated: dict[str, RetrievalScores]
    drift: NDArray[np.float64] = field(repr=False)
    churn: float
    churn_re_embedded: float
    k: int
    tolerance: float
    verdict: Verdict
    compensation: str | None
    reason: str

    @property
    def mean_drift(self) -> float:
        return float(self.drift.mean())

    @property
    def drift_quantiles(self) -> dict[float, float]:
        """The quantiles of the drift over the gallery items, by their level (0.05, 0.25, 0.5, 0.75 and 0.95)."""
        return {level: float(np.quantile(self.drift, level)) for level in QUANTILES}

    def summary(self, *, after: str) -> IndexUpdate:
        """The metrics, drift quantiles, churn and verdict, without the values of single queries and items.

        Args:
            after: a name for the update, such as the name of the split that the model has just learned.
        """
        return IndexUpdate(
            after=after,
            old_on_old=self.old.as_dict(),
            new_on_new=self.new.as_dict(),
            new_on_old=self.mixed.as_dict(),
            compensated={name: scores.as_dict() for name, scores in self.compensated.items()},
            drift=Drift(self.mean_drift, {f"{level:g}": value for level, value in self.drift_quantiles.items()}),
            k=self.k,
            churn=self.churn,
            churn_re_embedded=self.churn_re_embedded,
            verdict=self.verdict,
            compensation=self.compensation,
            reason=self.reason,
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields of `summary` as a JSON-compatible dictionary, without `after`."""
        return {name: value for name, value in asdict(self.summary(after="")).items() if name != "after"}

    def __str__(self) -> str:
        rows = {"old on old": self.old, "new on new": self.new, "new on old": self.mixed}
        rows |= {f"new on old, {name}": scores for name, scores in self.compensated.items()}
        width = max(map(len, rows))
        lines = [f"{self.verdict}: {self.reason}", "", f"{'':{width}}    mAP    P@1"]
        for name, scores in rows.items():
            lines.append(f"{name:{width}}  {scores.mean_average_precision:.3f}  {scores.precision_at_1:.3f}")
        quantiles = self.drift_quantiles
        lines += [
            "",
            f"drift of the gallery: mean {self.mean_drift:.3g}, median {quantiles[0.5]:.3g}, 95 % up to {quantiles[0.95]:.3g}",
            f"churn of the {self.k} nearest: {self.churn:.1%} on the old gallery, {self.churn_re_embedded:.1%} on the new one",
        ]
        return "\n".join(lines)


def compare_indexes(
    old_queries: ArrayLike | Tensor,
    new_queries: ArrayLike | Tensor,
    old_gallery: ArrayLike | Tensor,
    new_gallery: ArrayLike | Tensor,
    query_labels: ArrayLike | Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    query_ids: ArrayLike | Tensor | None = None,
    gallery_ids: ArrayLike | Tensor | None = None,
    distance: Distance = "cosine",
    k: int = 10,
    tolerance: float = 0.01,
    fit_on: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
    compensate: Sequence[str] | Mapping[str, Compensation] = ("drift", "procrustes", "ridge"),
    progress: bool = False,
) -> IndexCompatibility:
    """Retrieval scores of old and new queries on the old and the new gallery, and a verdict on keeping the old gallery.

    The verdict compares mAP, the mean average precision over the full ranking:

    - "keep" if the mAP of new queries on the old gallery is at least that of new queries on the new gallery, minus
      `tolerance`;
    - "compensate" if this does not hold for the old gallery, but holds for the old gallery after the best compensation;
    - "re-embed" otherwise.

    The reference is therefore the mAP that embedding the gallery again would give. The verdict does not say whether the
    update improved the model: if new queries on the new gallery score lower than old queries on the old gallery by more than
    `tolerance`, `reason` mentions it.

    Args:
        old_queries: [Q, D] the queries as the old model embedded them, finite.
        new_queries: [Q, D] the same queries as the new model embedded them.
        old_gallery: [G, D] the gallery as the old model embedded it. A sample of the full gallery is enough.
        new_gallery: [G, D] the same gallery items as the new model embedded them.
        query_labels: [Q] integers.
        gallery_labels: [G] integers.
        query_ids: [Q] integers that identify the item of each query. Given together with `gallery_ids`; a query then does
            not retrieve gallery items with its id.
        gallery_ids: [G] integers that identify the gallery items.
        distance: "cosine", "euclidean" or "inner_product".
        k: the number of nearest neighbours whose churn is measured, from 1 to the number of gallery items without those
            that share the query's id. Items that tie for the k-th rank may count as churn.
        tolerance: the difference in mAP that counts as equal, >= 0.
        fit_on: items that compensations are fitted on, embedded by both models (old [M, D], new [M, D]). They should not be
            gallery items; the training items of the new split serve well. None means that no compensation is tried.
        compensate: names from `COMPENSATIONS`, or a mapping from any name to an estimator; this function fits them. Under
            "cosine" they receive rows of unit length. Of a gallery larger than 64 MiB, `transform` is given some rows at a time,
            more than once, so that galleries mapped from a file may be larger than memory.
        progress: whether to show progress bars.

    Raises:
        UserError: old and new embeddings differ in shape; `k`, `tolerance` or the name of a compensation is not accepted;
            or `evaluate_retrieval` refuses the arguments.

    Source: new queries on the old gallery are the cross-model test of Shen, Xiong, Xia, Soatto, *Towards Backward-Compatible
        Representation Learning*, CVPR 2020. The verdict is not from that paper.

    Examples:
        >>> import torch
        >>> rows, labels = torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2)
        >>> turned = rows.roll(1, dims=1)
        >>> result = compare_indexes(rows, turned, rows, turned, labels, labels, k=2, fit_on=(rows, turned))
        >>> result.verdict, result.mixed.precision_at_1, result.compensated["procrustes"].precision_at_1
        ('compensate', 0.0, 1.0)
    """
    queries = _OldAndNew.of("queries", old_queries, new_queries)
    gallery = _OldAndNew.of("gallery", old_gallery, new_gallery)
    k = as_whole_number("k", k)
    task = _RetrievalTask(query_labels, gallery_labels, query_ids, gallery_ids, distance)
    if not as_number("tolerance", tolerance) >= 0:
        raise UserError(f"tolerance must be >= 0, got {tolerance}")
    transforms = _compensating_transforms(fit_on, compensate, distance)
    old = task.scores("old on old", queries.old, gallery.old, progress=progress)
    new = task.scores("new on new", queries.new, gallery.new, progress=progress)
    mixed = task.scores("new on old", queries.new, gallery.old, progress=progress)
    compensated = {
        name: task.scores(name, queries.new, gallery.old, transform, progress=progress)
        for name, transform in transforms.items()
    }
    verdict, compensation, reason = _verdict(old, new, mixed, compensated, tolerance)
    nearest_before = task.nearest(queries.old, gallery.old, k)
    return IndexCompatibility(
        old=old,
        new=new,
        mixed=mixed,
        compensated=compensated,
        drift=_drift_of_items(gallery, distance),
        churn=1 - share_in_common(nearest_before, task.nearest(queries.new, gallery.old, k)),
        churn_re_embedded=1 - share_in_common(nearest_before, task.nearest(queries.new, gallery.new, k)),
        k=k,
        tolerance=tolerance,
        verdict=verdict,
        compensation=compensation,
        reason=reason,
    )


class _OldAndNew(NamedTuple):
    """The embeddings [N, D] of the same items by the old and by the new model."""

    old: Tensor
    new: Tensor

    @classmethod
    def of(cls, name: str, old: ArrayLike | Tensor, new: ArrayLike | Tensor) -> _OldAndNew:
        """The pair as tensors; raises `UserError` if the shapes differ. `name` is used in errors."""
        pair = cls(as_embeddings(old, f"old {name}"), as_embeddings(new, f"new {name}"))
        if pair.old.shape != pair.new.shape:
            shapes = f"got {list(pair.old.shape)} and {list(pair.new.shape)}"
            raise UserError(f"old and new {name} must be embeddings of the same items, of equal size, {shapes}")
        return pair

    def for_distance(self, distance: Distance, name: str) -> _OldAndNew:
        """Both in float64, scaled to unit length under "cosine", which does not depend on lengths."""
        if distance != "cosine":
            return _OldAndNew(self.old.double(), self.new.double())
        return _OldAndNew(unit_rows(self.old, f"old {name}"), unit_rows(self.new, f"new {name}"))


@dataclass(frozen=True)
class _RetrievalTask:
    """The labels, ids and distance, which are the same whichever model embeds the items."""

    query_labels: ArrayLike | Tensor
    gallery_labels: ArrayLike | Tensor
    query_ids: ArrayLike | Tensor | None
    gallery_ids: ArrayLike | Tensor | None
    distance: Distance

    def scores(
        self, name: str, queries: Tensor, gallery: Tensor, transform: Transform | None = None, *, progress: bool
    ) -> RetrievalScores:
        """The scores of queries on a gallery, which may be transformed; the name is that of the progress bar."""
        return evaluate_transformed_gallery(
            queries,
            self.query_labels,
            gallery,
            self.gallery_labels,
            transform=transform,
            query_ids=self.query_ids,
            gallery_ids=self.gallery_ids,
            distance=self.distance,
            description=name if progress else None,
        )

    def nearest(self, queries: Tensor, gallery: Tensor, k: int) -> NDArray[np.int64]:
        """Positions [Q, k] of the nearest gallery items, without those that have the query's id."""
        if self.query_ids is None or self.gallery_ids is None:
            query_ids, gallery_ids = np.zeros(len(queries)), np.ones(len(gallery))
        else:
            query_ids = as_integers(self.query_ids, "query_ids", len(queries)).cpu().numpy()
            gallery_ids = as_integers(self.gallery_ids, "gallery_ids", len(gallery)).cpu().numpy()
        shared_ids = gallery_ids[np.isin(gallery_ids, query_ids)]
        max_excluded = int(np.unique(shared_ids, return_counts=True)[1].max(initial=0))
        if not 1 <= k <= len(gallery) - max_excluded:
            raise UserError(
                f"k must lie between 1 and the {len(gallery) - max_excluded} gallery items left for a query, got {k}"
            )
        positions = find_nearest(queries, gallery, k + max_excluded, distance=self.distance)[1]
        excluded_last = np.argsort(gallery_ids[positions] == query_ids[:, None], axis=1, kind="stable")
        return np.take_along_axis(positions, excluded_last, axis=1)[:, :k]


def _compensating_transforms(
    fit_on: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None,
    compensate: Sequence[str] | Mapping[str, Compensation],
    distance: Distance,
) -> dict[str, Transform]:
    """What each compensation does to rows [N, D] of the old gallery, by the name of the compensation."""
    if fit_on is None:
        return {}
    if not isinstance(fit_on, Sequence) or isinstance(fit_on, str) or len(fit_on) != 2:
        raise UserError("fit_on must be a pair (old, new) of embeddings of the same items")
    if isinstance(compensate, str) or not isinstance(compensate, Sequence | Mapping):
        raise UserError(
            f"compensate must be a list of names, or a mapping from name to estimator, got {shown(compensate)}"
        )
    estimators = compensate if isinstance(compensate, Mapping) else {name: COMPENSATIONS[name]() for name in compensate}
    for name, estimator in estimators.items():
        if not (hasattr(estimator, "fit") and hasattr(estimator, "transform")):
            raise UserError(f"the compensation '{name}' must have methods fit and transform, got {shown(estimator)}")
    pair = _OldAndNew.of("fit_on", *fit_on).for_distance(distance, "fit_on")
    return {name: partial(_transformed, estimator.fit(*pair), distance) for name, estimator in estimators.items()}


def _transformed(fitted: Compensation, distance: Distance, rows: Tensor) -> Tensor:
    """Rows [N, D] of the old gallery as a fitted compensation moves them."""
    return as_tensor(
        fitted.transform(unit_rows(rows, "old gallery") if distance == "cosine" else rows.double()),
        "the compensated gallery",
    )


def _verdict(
    old: RetrievalScores,
    new: RetrievalScores,
    mixed: RetrievalScores,
    compensated: Mapping[str, RetrievalScores],
    tolerance: float,
) -> tuple[Verdict, str | None, str]:
    """The verdict, the name of the best compensation, and the reason."""
    target = new.mean_average_precision
    by_compensation = {name: scores.mean_average_precision for name, scores in compensated.items()}
    best = max(by_compensation, key=by_compensation.__getitem__, default=None)
    verdict: Verdict = "re-embed"
    if mixed.mean_average_precision >= target - tolerance:
        verdict = "keep"
    elif best is not None and by_compensation[best] >= target - tolerance:
        verdict = "compensate"
    reason = (
        f"new queries reach a mAP of {mixed.mean_average_precision:.3f} on the old gallery, "
        f"{'within' if verdict == 'keep' else 'not within'} {tolerance:g} of the {target:.3f} on the new one"
    )
    if verdict != "keep":
        reason += (
            "; no compensation was tried" if best is None else f"; compensated by '{best}', {by_compensation[best]:.3f}"
        )
    if target < old.mean_average_precision - tolerance:
        reason += f"; the old model on its own gallery was better, {old.mean_average_precision:.3f}"
    return verdict, best, reason


def _drift_of_items(gallery: _OldAndNew, distance: Distance) -> NDArray[np.float64]:
    """[G] the distance between the old and the new embedding of each item; 1 - cosine under "cosine"."""
    parts = []
    for old, new in zip(gallery.old.split(ROWS_AT_ONCE), gallery.new.split(ROWS_AT_ONCE), strict=True):
        rows = _OldAndNew(old, new).for_distance(distance, "gallery")
        lengths = (rows.new - rows.old).norm(dim=1)
        # For unit vectors 1 - u.v = |u - v|^2 / 2, which is exactly 0 for an item that did not move
        parts.append((lengths.square() / 2 if distance == "cosine" else lengths).cpu().numpy())
    return np.concatenate(parts)
