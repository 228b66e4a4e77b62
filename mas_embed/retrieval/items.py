"""The queries and the gallery of an evaluation, with their labels or their relevant items, checked.

Q queries, G gallery items, N items of either kind, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mas_embed.errors import UserError, reason_of
from mas_embed.retrieval.inputs import as_embeddings
from mas_embed.retrieval.ranking import PositionLists
from mas_embed.runtime.arrays import as_integers

ENTRIES_AT_ONCE = 2**26  # of a matrix of relevant items


class Items(NamedTuple):
    """The embeddings [N, D], labels [N] (None if `relevant` is given) and ids [N] of queries or a gallery, on one device."""

    rows: Tensor
    labels: Tensor | None
    ids: Tensor


def as_items(
    name: str, rows: ArrayLike | Tensor, labels: ArrayLike | Tensor | None, ids: ArrayLike | Tensor | None
) -> Items:
    """The arguments as tensors; the ids are the positions if none are given."""
    embeddings = as_embeddings(rows, "queries" if name == "query" else name)
    num_items = len(embeddings)
    item_ids = torch.arange(num_items) if ids is None else as_integers(ids, f"{name}_ids", num_items)
    item_labels = None if labels is None else as_integers(labels, f"{name}_labels", num_items).to(embeddings.device)
    return Items(embeddings, item_labels, item_ids.to(embeddings.device))


def relevant_lists(relevant: Any, queries: Items, gallery: Items, *, by_id: bool) -> PositionLists:
    """The relevant gallery items of every query, which may include the query itself."""
    if relevant is None:
        assert queries.labels is not None
        assert gallery.labels is not None
        return PositionLists.of_equal_keys(queries.labels, gallery.labels)
    num_queries, num_gallery = len(queries.rows), len(gallery.rows)
    relevant = _rows_of(relevant)
    if len(relevant) != num_queries:
        raise UserError(f"relevant must have one row for each of the {num_queries} queries, got {len(relevant)}")
    if all(row.dtype in (torch.bool, np.bool_) for row in relevant):
        lengths = sorted({len(row) for row in relevant})
        if lengths != [num_gallery]:
            got = [num_queries, *lengths] if len(lengths) == 1 else "rows of different lengths"
            raise UserError(f"relevant, given as booleans, must have shape {[num_queries, num_gallery]}, got {got}")
        step = max(1, ENTRIES_AT_ONCE // num_gallery)
        parts = [[torch.as_tensor(row) for row in relevant[at : at + step]] for at in range(0, num_queries, step)]
        masks = (torch.stack(part).to(queries.rows.device) for part in parts)
        sizes, positions = map(torch.cat, zip(*((mask.sum(1), mask.nonzero()[:, 1]) for mask in masks), strict=True))
    else:
        rows = [as_integers(row, "relevant items") for row in relevant]
        if all(len(row) == num_gallery > 1 and not (row > 1).any() for row in rows):
            raise UserError(
                "relevant holds a 0 or 1 for every gallery item: give it as booleans, or list the relevant items"
            )
        lists = [row.cpu().unique() for row in rows]
        sizes, items = torch.tensor([len(row) for row in lists]), torch.cat(lists)
        positions = _positions_of(items, gallery.ids if by_id else torch.arange(num_gallery)).to(queries.rows.device)
        sizes = sizes.to(queries.rows.device)
    ends = sizes.cumsum(0)
    return PositionLists(positions, ends - sizes, ends)


def _rows_of(relevant: Any) -> Any:
    """The rows, one a query, as a matrix or as a list of arrays; raises `UserError` if there are no rows."""
    try:
        is_matrix = isinstance(relevant, Tensor | np.ndarray) and relevant.dtype != object
        rows = relevant if is_matrix else [np.asarray(row) for row in relevant]
        if isinstance(relevant, str | Mapping) or any(row.ndim != 1 for row in rows):
            raise ValueError("it has no rows")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"relevant must be a matrix of booleans, or one list of items a query: {reason_of(error)}"
        ) from None
    return rows


def _positions_of(items: Tensor, ids: Tensor) -> Tensor:
    """The positions of the items in the ids; raises `UserError` if the ids are not distinct or an item is not among them."""
    in_order, positions = ids.cpu().sort()
    if bool((in_order[1:] == in_order[:-1]).any()):
        raise UserError("gallery_ids must all differ if relevant lists them")
    found = torch.searchsorted(in_order, items).clamp_max(len(in_order) - 1)
    unknown = items[in_order[found] != items]
    if len(unknown):
        raise UserError(f"relevant lists the gallery item {int(unknown[0])}, which does not exist")
    return positions[found]


def check_arguments(
    query_labels: Any, gallery: Any, gallery_labels: Any, relevant: Any, query_ids: Any, gallery_ids: Any
) -> None:
    """Raises `UserError` if a required argument is missing, or if arguments contradict each other."""
    if relevant is not None and (query_labels is not None or gallery_labels is not None):
        raise UserError("relevant replaces the labels: pass query_labels=None and no gallery_labels")
    if relevant is None and query_labels is None:
        raise UserError("query_labels is None: pass the labels of the queries, or relevant")
    if relevant is None and (gallery is None) != (gallery_labels is None):
        raise UserError(
            "gallery and gallery_labels go together: pass both, or neither to rank the queries among themselves"
        )
    if query_ids is not None and (gallery is None or gallery_ids is None):
        raise UserError("query_ids and gallery_ids go together and require a gallery")
    if gallery_ids is not None and query_ids is None and relevant is None:
        raise UserError("query_ids and gallery_ids go together and require a gallery")
