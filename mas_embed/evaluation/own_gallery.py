"""Whether a split is forgotten, or confused with other splits: its scores with its own gallery only.

If the queries of a split find their class among the items of their own split, but not among those of all splits, the classes of
different splits have come to lie in one place; the split is confused with others rather than forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.data import Part, Split
from mas_embed.errors import UserError
from mas_embed.evaluation.score_matrix import mean_of_measured
from mas_embed.retrieval import Distance, SmallItems, evaluate_retrieval, score_small_galleries

OWN_GALLERY_METRICS = ("mean_average_precision", "precision_at_1", "recall_at_1")  # the last two are the same
MOST_PAIRS = 2**20  # of a query and an item, that are scored at once

Values = tuple[NDArray[np.float64], NDArray[np.float64]]  # average precision and precision at 1 of queries


def check_queries_are_answerable(splits: Sequence[Split]) -> None:
    """Raises `UserError` for a query whose class the gallery of all splits lacks."""
    labels, ids = (torch.cat([getattr(split.gallery, name) for split in splits]) for name in ("labels", "ids"))
    for split in splits:
        for label in split.query.labels.unique():
            query_ids = split.query.ids[split.query.labels == label]
            in_gallery = ids[labels == label]
            # A query is unanswerable if the gallery has no item of its class, or only the query itself
            if len(in_gallery) == 0 or (len(in_gallery) == 1 and bool((query_ids == in_gallery).any())):
                raise UserError(
                    f"split '{split.name}' has queries of class {int(label)}, but no gallery has another image of that class"
                )


def scores_of_own_galleries(
    splits: Sequence[Split], queries: Sequence[Tensor], galleries: Sequence[Tensor], *, distance: Distance
) -> dict[str, list[float]]:
    """By metric the scores [S], where the queries of a split search the gallery of their split and no other.

    A query without a relevant item there is left out; a split is NaN where all are.

    Args:
        splits: S splits.
        queries: the embeddings [Q, D] of the queries of these splits, and of others behind them.
        galleries: the embeddings [G, D] of their galleries.
        distance: by which items are ranked.
    """
    items = list(zip(splits, queries, galleries, strict=False))
    num_pairs = len(items) * max(len(rows) for _, rows, _ in items) * max(len(rows) for _, _, rows in items)
    is_small = num_pairs <= MOST_PAIRS
    values = _values_at_once(items, distance) if is_small else [_values_of_one(*one, distance) for one in items]
    average_precision, precision_at_1 = ([mean_of_measured(one[kind]) for one in values] for kind in (0, 1))
    return dict(zip(OWN_GALLERY_METRICS, (average_precision, precision_at_1, precision_at_1), strict=True))


def _values_at_once(items: Sequence[tuple[Split, Tensor, Tensor]], distance: Distance) -> list[Values]:
    splits, queries, galleries = zip(*items, strict=True)
    joined = [
        _joined([getattr(split, part) for split in splits], rows)
        for part, rows in (("query", queries), ("gallery", galleries))
    ]
    scores = score_small_galleries(*joined, distance=distance)
    ends = np.cumsum([len(rows) for rows in queries])[:-1]
    return list(zip(*(np.split(values, ends) for values in scores), strict=True))


def _joined(parts: Sequence[Part], rows: Sequence[Tensor]) -> SmallItems:
    labels, ids = (torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "ids"))
    return SmallItems(torch.cat(list(rows)), labels, ids, [len(part) for part in parts])


def _values_of_one(split: Split, queries: Tensor, gallery: Tensor, distance: Distance) -> Values:
    if not _is_answerable(split):
        return np.full(1, np.nan), np.full(1, np.nan)
    per_query = evaluate_retrieval(
        queries,
        split.query.labels,
        gallery,
        split.gallery.labels,
        query_ids=split.query.ids,
        gallery_ids=split.gallery.ids,
        distance=distance,
        recall_at=(1,),
    ).per_query
    return per_query["average_precision"], per_query["precision_at_1"]


def _is_answerable(split: Split) -> bool:
    """Whether any query of the split has a relevant item in the gallery of the split, not counting the query itself."""
    query, gallery = split.query, split.gallery
    by_label = Counter(gallery.labels.tolist())
    by_item = Counter(zip(gallery.labels.tolist(), gallery.ids.tolist(), strict=True))
    items = zip(query.labels.tolist(), query.ids.tolist(), strict=True)
    return any(by_label[item[0]] > by_item[item] for item in items)
