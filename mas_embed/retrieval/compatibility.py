"""After an update of the model: can the old gallery stay, or must it be embedded again?

Q queries, G gallery items, K neighbours, M items to fit on, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.retrieval.compensation import COMPENSATIONS, Compensation
from mas_embed.retrieval.inputs import as_embeddings, as_integers, share_in_common, unit_rows
from mas_embed.retrieval.metrics import RetrievalScores, evaluate_retrieval
from mas_embed.retrieval.search import find_nearest
from mas_embed.retrieval.similarity import Distance

Verdict = Literal["keep", "compensate", "re-embed"]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Drift:
    """How far the items of a gallery moved.

    Attributes:
        mean: over the items.
        quantiles: by share of the gallery ("0.05" to "0.95"), the drift that so many items do not exceed.
    """

    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class IndexUpdate:
    """An `IndexCompatibility` in numbers and texts alone: what one update of the model did to an index made before it.

    Attributes:
        after: a name for the update.
        old_on_old: by metric the scores of old queries on the old gallery.
        new_on_new: of new queries on the new gallery.
        new_on_old: of new queries on the old gallery.
        compensated: by compensation, of new queries on the old gallery that it moved.
        drift: of the old gallery's items.
        k: of the churn.
        churn: mean share of a query's k nearest (old on old) that new queries no longer find on the old gallery.
        churn_re_embedded: the same for new queries on the new gallery.
        verdict: "keep", "compensate" or "re-embed".
        compensation: the name of the best compensation; None if none was tried.
        reason: of the verdict, one sentence.
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
    """How the queries of a new model fare with the gallery of an old one.

    Attributes:
        old: old queries on the old gallery, as it was before the update.
        new: new queries on the new gallery, as it would be after embedding it again.
        mixed: new queries on the old gallery.
        compensated: by compensation, new queries on the old gallery that it moved.
        drift: [G] how far each gallery item moved: 1 - cosine under "cosine", else the Euclidean distance.
        churn: mean share of a query's k nearest (old on old) that new queries no longer find on the old gallery.
        churn_re_embedded: the same for new queries on the new gallery.
        k: of the churn.
        tolerance: of the verdict.
        verdict: "keep", "compensate" or "re-embed", by the rule in `compare_indexes`.
        compensation: the name of the best compensation, by mean average precision; None if none was tried.
        reason: the verdict's rule with the numbers put in, one sentence.
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
        """By share of the gallery (5, 25, 50, 75 and 95 %), the drift that so many items do not exceed."""
        return {share: float(np.quantile(self.drift, share)) for share in QUANTILES}

    def summary(self, *, after: str) -> IndexUpdate:
        """Everything but the drift of single items, in numbers and texts alone.

        Args:
            after: a name for the update, such as that of the split that was learned.
        """
        return IndexUpdate(
            after=after,
            old_on_old=self.old.as_dict(),
            new_on_new=self.new.as_dict(),
            new_on_old=self.mixed.as_dict(),
            compensated={name: scores.as_dict() for name, scores in self.compensated.items()},
            drift=Drift(self.mean_drift, {f"{share:g}": value for share, value in self.drift_quantiles.items()}),
            k=self.k,
            churn=self.churn,
            churn_re_embedded=self.churn_re_embedded,
            verdict=self.verdict,
            compensation=self.compensation,
            reason=self.reason,
        )

    def as_dict(self) -> dict[str, Any]:
        """The `summary` as JSON, without a name for the update."""
        return {name: value for name, value in asdict(self.summary(after="")).items() if name != "after"}

    def __str__(self) -> str:
        rows = {"old on old": self.old, "new on new": self.new, "new on old": self.mixed}
        rows |= {f"new on old, {name}": scores for name, scores in self.compensated.items()}
        width = max(map(len, rows))
        lines = [f"{self.verdict}: {self.reason}", "", f"{'':{width}}    mAP    P@1"]
        for name, scores in rows.items():
            lines.append(f"{name:{width}}  {scores.mean_average_precision:.3f}  {scores.precision_at_1:.3f}")
        spread = self.drift_quantiles
        lines += [
            "",
            f"drift of the gallery: mean {self.mean_drift:.3g}, median {spread[0.5]:.3g}, 95 % up to {spread[0.95]:.3g}",
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
) -> IndexCompatibility:
    """Scores old and new queries on the old and the new gallery, and says whether the old gallery can stay.

    The verdict goes by mean average precision over the full ranking, mAP:

    - "keep" if new queries on the old gallery come within `tolerance` of new queries on the new gallery (or above);
    - "compensate" if they do not, but do on the gallery that the best compensation moved;
    - "re-embed" otherwise.

    So the yardstick is what embedding the gallery again would give. Whether the update was worth it is another question: the
    reason says so where the new model on its own gallery is worse than the old one on its own by more than `tolerance`.

    Args:
        old_queries: [Q, D] of the old model, finite.
        new_queries: [Q, D] the same items of the new model.
        old_gallery: [G, D] of the old model.
        new_gallery: [G, D] the same items of the new model; a sample of the gallery will do.
        query_labels: [Q] integers.
        gallery_labels: [G] integers.
        query_ids: [Q] integers that tell which item a query is; with `gallery_ids`, gallery items with the query's id
            are left out.
        gallery_ids: [G] integers.
        distance: "cosine", "euclidean" or "inner_product".
        k: neighbours whose churn is measured, at least 1 and at most the gallery that is left for a query. Items that
            tie at the cut may count as churn.
        tolerance: >= 0, of mAP.
        fit_on: items (old [M, D], new [M, D]) to fit compensations on, such as the new split's, that are not the
            gallery's; None: no compensation is tried.
        compensate: names of `COMPENSATIONS`, or estimators by a name of your own, which are fitted here. Under "cosine"
            they see rows of length 1.

    Raises:
        UserError: old and new do not have the same number of rows and size; a k, tolerance or name that is not accepted;
            and as `evaluate_retrieval`.

    Source: "new queries on the old gallery" is the cross-model test of Shen, Xiong, Xia, Soatto, *Towards Backward-Compatible
        Representation Learning*, CVPR 2020. The verdict is this project's.

    Example:
        >>> import torch
        >>> rows, labels = torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2)
        >>> turned = rows.roll(1, dims=1)
        >>> result = compare_indexes(rows, turned, rows, turned, labels, labels, k=2, fit_on=(rows, turned))
        >>> result.verdict, result.mixed.precision_at_1, result.compensated["procrustes"].precision_at_1
        ('compensate', 0.0, 1.0)
    """
    queries = _Pair.of("queries", old_queries, new_queries)
    gallery = _Pair.of("gallery", old_gallery, new_gallery)
    task = _Task(query_labels, gallery_labels, query_ids, gallery_ids, distance)
    if not tolerance >= 0:
        raise UserError(f"tolerance must be >= 0, got {tolerance}")
    old, new = task.scores(queries.old, gallery.old), task.scores(queries.new, gallery.new)
    mixed = task.scores(queries.new, gallery.old)
    moved = _compensated(gallery.old, fit_on, compensate, distance)
    compensated = {name: task.scores(queries.new, rows) for name, rows in moved.items()}
    verdict, compensation, reason = _decide(old, new, mixed, compensated, tolerance)
    before = task.nearest(queries.old, gallery.old, k)
    return IndexCompatibility(
        old=old,
        new=new,
        mixed=mixed,
        compensated=compensated,
        drift=_drift(gallery, distance),
        churn=1 - share_in_common(before, task.nearest(queries.new, gallery.old, k)),
        churn_re_embedded=1 - share_in_common(before, task.nearest(queries.new, gallery.new, k)),
        k=k,
        tolerance=tolerance,
        verdict=verdict,
        compensation=compensation,
        reason=reason,
    )


class _Pair(NamedTuple):
    """The same items in the old and in the new space, [N, D] each."""

    old: Tensor
    new: Tensor

    @classmethod
    def of(cls, name: str, old: ArrayLike | Tensor, new: ArrayLike | Tensor) -> _Pair:
        pair = cls(as_embeddings(old, f"old {name}"), as_embeddings(new, f"new {name}"))
        if pair.old.shape != pair.new.shape:
            shapes = f"got {list(pair.old.shape)} and {list(pair.new.shape)}"
            raise UserError(f"old and new {name} must be the same items embedded in one size, {shapes}")
        return pair

    def for_distance(self, distance: Distance, name: str) -> _Pair:
        """Both in float64, at length 1 under "cosine", which sees no lengths."""
        if distance != "cosine":
            return _Pair(self.old.double(), self.new.double())
        return _Pair(unit_rows(self.old, f"old {name}"), unit_rows(self.new, f"new {name}"))


@dataclass(frozen=True)
class _Task:
    """What does not change when the embeddings do."""

    query_labels: ArrayLike | Tensor
    gallery_labels: ArrayLike | Tensor
    query_ids: ArrayLike | Tensor | None
    gallery_ids: ArrayLike | Tensor | None
    distance: Distance

    def scores(self, queries: Tensor, gallery: Tensor) -> RetrievalScores:
        return evaluate_retrieval(
            queries,
            self.query_labels,
            gallery,
            self.gallery_labels,
            query_ids=self.query_ids,
            gallery_ids=self.gallery_ids,
            distance=self.distance,
        )

    def nearest(self, queries: Tensor, gallery: Tensor, k: int) -> NDArray[np.int64]:
        """Positions [Q, k] of the nearest items, the query's own left out."""
        if self.query_ids is None or self.gallery_ids is None:
            asked, items = np.zeros(len(queries)), np.ones(len(gallery))
        else:
            asked = as_integers(self.query_ids, "query_ids", len(queries)).cpu().numpy()
            items = as_integers(self.gallery_ids, "gallery_ids", len(gallery)).cpu().numpy()
        of_queries = items[np.isin(items, asked)]
        most_own = int(np.unique(of_queries, return_counts=True)[1].max(initial=0))
        if not 1 <= k <= len(gallery) - most_own:
            raise UserError(
                f"k must lie between 1 and the {len(gallery) - most_own} gallery items left for a query, got {k}"
            )
        positions = find_nearest(queries, gallery, k + most_own, distance=self.distance)[1]
        own_last = np.argsort(items[positions] == asked[:, None], axis=1, kind="stable")
        return np.take_along_axis(positions, own_last, axis=1)[:, :k]


def _compensated(
    gallery: Tensor,
    fit_on: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None,
    compensate: Sequence[str] | Mapping[str, Compensation],
    distance: Distance,
) -> dict[str, Tensor]:
    """By name the gallery [G, D] that each compensation moved."""
    if fit_on is None:
        return {}
    by_name = compensate if isinstance(compensate, Mapping) else {name: COMPENSATIONS[name]() for name in compensate}
    fitted_on = _Pair.of("fit_on", *fit_on).for_distance(distance, "fit_on")
    rows = unit_rows(gallery, "old gallery") if distance == "cosine" else gallery.double()
    return {name: estimator.fit(*fitted_on).transform(rows) for name, estimator in by_name.items()}


def _decide(
    old: RetrievalScores,
    new: RetrievalScores,
    mixed: RetrievalScores,
    compensated: Mapping[str, RetrievalScores],
    tolerance: float,
) -> tuple[Verdict, str | None, str]:
    """The verdict, the best compensation's name, and the reason."""
    aim = new.mean_average_precision
    reached = {name: scores.mean_average_precision for name, scores in compensated.items()}
    best = max(reached, key=reached.__getitem__, default=None)
    verdict: Verdict = "re-embed"
    if mixed.mean_average_precision >= aim - tolerance:
        verdict = "keep"
    elif best is not None and reached[best] >= aim - tolerance:
        verdict = "compensate"
    reason = (
        f"new queries reach a mAP of {mixed.mean_average_precision:.3f} on the old gallery, "
        f"{'within' if verdict == 'keep' else 'not within'} {tolerance:g} of the {aim:.3f} on the new one"
    )
    if verdict != "keep":
        reason += "; no compensation was tried" if best is None else f"; compensated by '{best}', {reached[best]:.3f}"
    if aim < old.mean_average_precision - tolerance:
        reason += f"; the old model on its own gallery was better, {old.mean_average_precision:.3f}"
    return verdict, best, reason


def _drift(gallery: _Pair, distance: Distance) -> NDArray[np.float64]:
    """[G]."""
    rows = gallery.for_distance(distance, "gallery")
    lengths = (rows.new - rows.old).norm(dim=1)
    # Of unit vectors 1 - u.v = |u - v|^2 / 2, which is exactly 0 where nothing moved
    return (lengths.square() / 2 if distance == "cosine" else lengths).cpu().numpy()
