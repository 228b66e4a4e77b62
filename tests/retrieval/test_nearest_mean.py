"""Means by class, and which of them is nearest: against loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from mas_embed import UserError, class_means, nearest_class_mean_accuracy
from mas_embed.retrieval import DriftCompensation
from mas_embed.retrieval.nearest_mean import is_nearest_class_mean


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(num_items, num_classes, size=5, seed=0):
    """Embeddings around their class's place, of classes whose labels are neither consecutive nor in order."""
    labels = torch.tensor([40, 7, 2**40, -3, 11])[torch.arange(num_items) % num_classes]
    places = random(num_classes, size, seed=99)[torch.arange(num_items) % num_classes]
    return places + random(num_items, size, seed=seed), labels


def test_means_equal_the_loops():
    embeddings, labels = labelled(23, 5)
    found = class_means(embeddings, labels)
    assert found.labels.tolist() == sorted(set(labels.tolist()))
    for label, mean, count in zip(*(values.tolist() for values in found), strict=True):
        rows = [row for row, one in zip(embeddings.tolist(), labels.tolist(), strict=True) if one == label]
        assert count == len(rows)
        assert mean == pytest.approx([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)], rel=1e-12)


def test_means_are_summed_in_float64():
    embeddings = torch.tensor([[2.0**24], [1.0], [1.0]])  # in float32 the sum would stay 2^24
    assert class_means(embeddings, [0, 0, 0]).means.item() == (2**24 + 2) / 3


def test_merged_means_are_those_of_all_items():
    embeddings, labels = labelled(40, 4)
    order = labels.argsort(stable=True)  # so that either part has classes that the other lacks, and one is in both
    embeddings, labels = embeddings[order], labels[order]
    parts = [class_means(embeddings[part], labels[part]) for part in (slice(0, 17), slice(17, 40))]
    merged, whole = parts[0].merged_with(parts[1]), class_means(embeddings, labels)
    assert merged.labels.tolist() == whole.labels.tolist() and merged.counts.tolist() == whole.counts.tolist()
    torch.testing.assert_close(merged.means, whole.means, rtol=1e-12, atol=1e-14)
    only_first = merged.labels == parts[0].labels[0]
    assert torch.equal(merged.means[only_first][0], parts[0].means[0])  # to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_is_that_of_scikit_learn(dtype):
    (train, train_labels), (queries, labels) = labelled(50, 5), labelled(200, 5, seed=1)
    train, queries = train.to(dtype), queries.to(dtype)
    found = class_means(train, train_labels)
    predicted = NearestCentroid().fit(train.double().numpy(), train_labels.numpy()).predict(queries.double().numpy())
    expected = predicted == labels.numpy()
    assert 0.4 < expected.mean() < 0.95
    is_correct = is_nearest_class_mean(queries, labels, found.means, found.labels)
    np.testing.assert_array_equal(is_correct.numpy(), expected)
    accuracy = nearest_class_mean_accuracy(queries, labels, found.means, found.labels)
    assert accuracy == expected.sum() / 200


def test_order_of_means_and_size_of_blocks_change_nothing(monkeypatch):
    queries, labels = labelled(60, 5, seed=1)
    found = class_means(*labelled(50, 5))
    whole = is_nearest_class_mean(queries, labels, found.means, found.labels)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(is_nearest_class_mean(queries, labels, found.means[order], found.labels[order]), whole)
    monkeypatch.setattr("mas_embed.retrieval.nearest_mean.BLOCK_ELEMENTS", 17)
    assert torch.equal(is_nearest_class_mean(queries, labels, found.means, found.labels), whole)


def test_a_tie_is_wrong_for_either_class():
    means, labels = [[-1.0, 0.3], [1.0, 0.3]], [0, 1]
    assert nearest_class_mean_accuracy([[0.0, 2.0], [0.0, 2.0], [1e-6, 2.0]], [0, 1, 1], means, labels) == 1 / 3


def test_collapsed_embeddings_are_all_wrong():
    """Means of different numbers of equal vectors differ by rounding, which must not decide."""
    vector = random(1, 7)
    vector /= vector.norm()
    found = class_means(vector.repeat(31, 1), torch.arange(31) % 3)
    assert nearest_class_mean_accuracy(vector.repeat(3, 1), [0, 1, 2], found.means, found.labels) == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_does_not_matter(scale):
    queries, labels = labelled(60, 5, seed=1)
    found = class_means(*labelled(50, 5))
    expected = is_nearest_class_mean(queries, labels, found.means, found.labels)
    assert torch.equal(is_nearest_class_mean(queries * scale, labels, found.means * scale, found.labels), expected)


def test_means_are_not_normalised():
    """Two unit vectors at a right angle have a mean of length .71, to which the query is nearer than to the other class."""
    embeddings, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]]), [0, 0, 1]
    found = class_means(embeddings, labels)
    assert found.means[0].tolist() == [0.5, 0.5]
    query = [[0.8, -0.4]]  # .95 from (.5, .5), .45 from (.6, -.8)
    assert nearest_class_mean_accuracy(query, [1], found.means, found.labels) == 1


def test_drift_compensation_moves_means_as_the_paper_says():
    """Equations 10 to 13 of Yu et al., weight by weight, over two splits."""
    sigma = 0.3
    estimate = means = random(4, 3)
    pairs = [(random(9, 3, seed=seed), random(9, 3, seed=seed + 10)) for seed in (1, 2)]
    for old, new in pairs:
        estimate = DriftCompensation(sigma).fit(old, new).transform(estimate)
    expected = means.tolist()
    for old, new in pairs:
        moved = []
        for mean in expected:
            weights = [math.exp(-(math.dist(row, mean) ** 2) / (2 * sigma**2)) for row in old.tolist()]
            drift = [
                sum(w * (b[d] - a[d]) for w, a, b in zip(weights, old.tolist(), new.tolist(), strict=True))
                / sum(weights)
                for d in range(3)
            ]
            moved.append([m + d for m, d in zip(mean, drift, strict=True)])
        expected = moved
    torch.testing.assert_close(estimate, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_labels": [5, 5]}, "mean_labels must all differ, but 5 is there twice"),
        ({"query_labels": [3, 4]}, "query_labels has the class 4, which has no mean"),
        ({"query_labels": [3]}, "there are 2 embeddings but 1 query_labels"),
        ({"query_labels": [3.0, 5.0]}, "query_labels must be integers"),
        ({"mean_labels": [3, 5, 7]}, "there are 2 embeddings but 3 mean_labels"),
        ({"queries": [[0.0], [math.nan]]}, "queries contain NaN or infinite embeddings"),
        ({"means": [[0.0, 1.0], [1.0, 1.0]]}, "queries have 1 dimensions on cpu and means 2 dimensions on cpu"),
        ({"means": torch.empty(0, 1), "mean_labels": []}, "means must hold at least one embedding"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"queries": [[0.0], [1.0]], "query_labels": [3, 5], "means": [[0.0], [1.0]], "mean_labels": [3, 5]}
    with pytest.raises(UserError, match=message):
        nearest_class_mean_accuracy(**(arguments | changes))


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="there are 2 embeddings but 3 labels"):
        class_means([[0.0], [1.0]], [1, 2, 3])
