"""The nearest items of a few queries, against a full sort in plain Python."""

import math

import pytest
import torch

from mas_embed import UserError
from mas_embed.retrieval import exact_neighbours
from mas_embed.retrieval.exact_neighbours import nearest_items


def similarity(query, item, distance):
    dot = sum(a * b for a, b in zip(query, item, strict=True))
    if distance == "inner_product":
        return dot
    if distance == "euclidean":
        return -sum((a - b) ** 2 for a, b in zip(query, item, strict=True))
    return dot / math.sqrt(sum(a * a for a in query)) / math.sqrt(sum(b * b for b in item))


def sorted_items(query, query_id, gallery, gallery_ids, k, distance):
    """The positions and similarities of the k nearest items, nearest first, the first of equal ones first."""
    pairs = [
        (-similarity(query, item, distance), position)
        for position, (item, item_id) in enumerate(zip(gallery, gallery_ids, strict=True))
        if item_id != query_id
    ]
    return [(position, -negative) for negative, position in sorted(pairs)[:k]]


@pytest.mark.parametrize("pairs_at_once", [2**22, 40])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_the_nearest_are_those_of_a_full_sort(monkeypatch, distance, pairs_at_once):
    monkeypatch.setattr(exact_neighbours, "PAIRS_AT_ONCE", pairs_at_once)  # a part of the gallery at a time
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(size, 3, generator=generator) + 2 for size in (5, 23))
    query_ids, gallery_ids = torch.tensor([0, 1, 2, 99, 4]), torch.arange(23) % 20  # three ids are there twice
    found = nearest_items(queries, gallery, 4, distance=distance, query_ids=query_ids, gallery_ids=gallery_ids)
    for row in range(5):
        expected = sorted_items(
            queries[row].tolist(), int(query_ids[row]), gallery.tolist(), gallery_ids.tolist(), 4, distance
        )
        assert found.positions[row].tolist() == [position for position, _ in expected]
        assert found.similarities[row].tolist() == pytest.approx([value for _, value in expected], abs=1e-6)


def test_equal_items_are_in_the_order_of_the_gallery():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest_items(gallery[:1], gallery, 3).positions.tolist() == [[0, 2, 3]]


def test_what_is_missing_is_marked():
    gallery, ids = torch.eye(2), torch.tensor([7, 8])
    found = nearest_items(gallery, gallery, 3, query_ids=ids, gallery_ids=ids)
    assert found.positions.tolist() == [[1, -1, -1], [0, -1, -1]]
    assert found.similarities.isnan().tolist() == [[False, True, True]] * 2


def test_a_zero_row_has_no_cosine():
    with pytest.raises(UserError, match="all-zero embedding"):
        nearest_items(torch.zeros(1, 2), torch.eye(2), 1)
