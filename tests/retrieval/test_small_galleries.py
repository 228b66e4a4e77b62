"""Many small galleries scored at once, against plain loops and against a call for each."""

import numpy as np
import pytest
import torch

from mas_embed import evaluate_retrieval
from mas_embed.retrieval import SmallItems, score_small_galleries


def values_by_loops(similarities, is_relevant):
    """Average precision and precision at 1 of one query, from the similarities of the items that it may retrieve."""
    relevant = [s for s, r in zip(similarities, is_relevant, strict=True) if r]
    others = [s for s, r in zip(similarities, is_relevant, strict=True) if not r]
    if not relevant:
        return np.nan, np.nan
    precisions = [
        sum(s >= score for s in relevant) / (sum(s >= score for s in relevant) + sum(s >= score for s in others))
        for score in relevant
    ]
    return sum(precisions) / len(relevant), float(max(relevant) > max(others, default=-np.inf))


def random_items(sizes, generator, num_classes=3):
    rows = torch.randint(-2, 3, (sum(sizes), 3), generator=generator).float()  # few values, so that many scores tie
    rows[(rows == 0).all(1)] = 1
    labels = torch.randint(num_classes, (sum(sizes),), generator=generator)
    return rows, labels


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_values_equal_those_of_loops_and_of_a_call_for_each_gallery(distance):
    generator = torch.Generator().manual_seed(0)
    sizes_q, sizes_g = [4, 1, 7], [9, 3, 5]
    (queries, query_labels), (gallery, gallery_labels) = (random_items(s, generator) for s in (sizes_q, sizes_g))
    query_ids, gallery_ids = torch.arange(12), torch.arange(17) + 3  # some queries are gallery items, of whatever class
    found = score_small_galleries(
        SmallItems(queries, query_labels, query_ids, sizes_q),
        SmallItems(gallery, gallery_labels, gallery_ids, sizes_g),
        distance=distance,
    )
    starts_q, starts_g = np.cumsum([0, *sizes_q]), np.cumsum([0, *sizes_g])
    for which in range(3):
        of_q, of_g = (slice(starts[which], starts[which + 1]) for starts in (starts_q, starts_g))
        arguments = queries[of_q], query_labels[of_q], gallery[of_g], gallery_labels[of_g]
        ids = {"query_ids": query_ids[of_q], "gallery_ids": gallery_ids[of_g]}
        expected = evaluate_retrieval(*arguments, **ids, distance=distance).per_query
        np.testing.assert_allclose(found.average_precision[of_q], expected["average_precision"], rtol=1e-12)
        np.testing.assert_array_equal(found.precision_at_1[of_q], expected["precision_at_1"])
        for q in range(*of_q.indices(12)):
            items = [g for g in range(*of_g.indices(17)) if gallery_ids[g] != query_ids[q]]
            exact = [similarity(queries[q], gallery[g], distance) for g in items]
            by_loops = values_by_loops(exact, [bool(gallery_labels[g] == query_labels[q]) for g in items])
            values = found.average_precision[q], found.precision_at_1[q]
            np.testing.assert_allclose(values, by_loops, rtol=1e-12)


def similarity(query, item, distance):
    query, item = query.double(), item.double()
    if distance == "euclidean":
        return round(-float((query - item).square().sum()), 9)
    dot = float(query @ item)
    return round(dot / float(query.norm() * item.norm()), 9) if distance == "cosine" else dot


def test_one_gallery_by_hand():
    # Nearest first: relevant, irrelevant, then a relevant and an irrelevant one at the same place
    gallery = torch.tensor([[1.0], [2.0], [3.0], [3.0]])
    items = SmallItems(gallery, torch.tensor([0, 1, 0, 1]), torch.arange(4), [4])
    query = SmallItems(torch.tensor([[0.0]]), torch.tensor([0]), torch.tensor([9]), [1])
    found = score_small_galleries(query, items, distance="euclidean")
    assert found.average_precision.tolist() == [(1 + 2 / 4) / 2]
    assert found.precision_at_1.tolist() == [1.0]
