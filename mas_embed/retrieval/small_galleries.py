"""Average precision on many small galleries at once, each of which has queries of its own.

N galleries, Q queries and G items of all galleries together, q and g the largest number of queries and items of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.retrieval.similarity import Distance, Rows, exact_scores, prepare_rows


class SmallItems(NamedTuple):
    """Queries or gallery items of all galleries together, one gallery after another.

    Attributes:
        rows: [., D] the embeddings, finite, on the CPU.
        labels: [.] of the items; an item is relevant to a query with its label.
        ids: [.] of the items; a query does not retrieve an item with its id.
        sizes: [N] the number of items of every gallery.
    """

    rows: Tensor
    labels: Tensor
    ids: Tensor
    sizes: Sequence[int]

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """Values [., ...] of the items as a batch [N, largest size, ...]."""
        return torch.nn.utils.rnn.pad_sequence(values.split(list(self.sizes)), batch_first=True, padding_value=fill)


class SmallGalleryScores(NamedTuple):
    """Values of every query; NaN for one without a relevant item.

    Attributes:
        average_precision: [Q] float64, over the full ranking; items with equal scores form one group.
        precision_at_1: [Q] float64, whether the nearest item is relevant; at equal scores an irrelevant item is nearer.
    """

    average_precision: NDArray[np.float64]
    precision_at_1: NDArray[np.float64]


def score_small_galleries(
    queries: SmallItems, gallery: SmallItems, *, distance: Distance = "cosine"
) -> SmallGalleryScores:
    """The values of `evaluate_retrieval`, where the queries of each gallery search that gallery and no other.

    All galleries are scored at once, in O(N q g) memory, which saves the fixed costs of a call for each.

    Args:
        queries: of all galleries.
        gallery: the items of all galleries.
        distance: "cosine", "euclidean" or "inner_product".
    """
    prepared = prepare_rows(queries.rows, gallery.rows, distance)
    rows = [
        Rows(*(items.padded(values, 1.0) for values in (one.values, one.divisor, one.grid)))
        for one, items in zip(prepared, (queries, gallery), strict=True)
    ]
    is_item = gallery.padded(torch.ones(len(gallery.rows), dtype=torch.bool), False)[:, None]
    is_itself = queries.padded(queries.ids, 0)[:, :, None] == gallery.padded(gallery.ids, 0)[:, None]
    scores = exact_scores(rows[0], rows[1], distance).masked_fill_(is_itself | ~is_item, -torch.inf)
    has_label = queries.padded(queries.labels, 0)[:, :, None] == gallery.padded(gallery.labels, 0)[:, None]
    values = _values(scores.numpy(), (has_label & (scores > -torch.inf)).numpy())
    is_query = queries.padded(torch.ones(len(queries.rows), dtype=torch.bool), False).numpy()
    return SmallGalleryScores(*(one[is_query] for one in values))


def _values(scores: NDArray[Any], is_relevant: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    """Average precision and precision at 1 from scores [..., g], of which -inf are not retrieved."""
    nearest_first = np.argsort(-scores, axis=-1)
    scores, is_relevant = (np.take_along_axis(values, nearest_first, -1) for values in (scores, is_relevant))
    num_relevant = is_relevant.cumsum(-1)
    # Items with equal scores form one group: all of it counts, up to its last item
    num_items = np.arange(1, scores.shape[-1] + 1)
    is_last = np.ones_like(is_relevant)
    is_last[..., :-1] = scores[..., :-1] != scores[..., 1:]
    last = np.where(is_last, num_items, scores.shape[-1])[..., ::-1]
    last = np.minimum.accumulate(last, axis=-1)[..., ::-1]
    precision = np.take_along_axis(num_relevant, last - 1, -1) / last
    is_in_first_group = num_items <= last[..., :1]
    is_first = (is_relevant | ~is_in_first_group).all(-1)
    size = num_relevant[..., -1]
    with np.errstate(invalid="ignore"):
        return (precision * is_relevant).sum(-1) / size, np.where(size == 0, np.nan, is_first)
