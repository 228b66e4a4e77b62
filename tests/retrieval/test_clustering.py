import math

import pytest
import torch

from mas_embed import UserError
from mas_embed.retrieval.clustering import clustering_scores


def class_centres_with_noise(num_classes=3, per_class=20, noise=0.05):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    return torch.eye(num_classes)[labels] + noise * torch.randn(len(labels), num_classes, generator=generator), labels


def test_separate_classes_score_1_whatever_their_labels():
    embeddings, labels = class_centres_with_noise()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for distance in ("cosine", "euclidean"):
        scores = clustering_scores(embeddings[order], 2**40 - labels[order], distance=distance)
        assert scores == pytest.approx({"normalized_mutual_information": 1.0, "adjusted_mutual_information": 1.0})


def test_two_labels_in_a_cluster_by_hand():
    """Four labels, two clusters of two labels: I = ln 2, entropies ln 4 and ln 2."""
    embeddings = [[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4
    scores = clustering_scores(embeddings, [0, 0, 1, 1, 2, 2, 3, 3], num_clusters=2)
    assert scores["normalized_mutual_information"] == pytest.approx(2 * math.log(2) / (math.log(4) + math.log(2)))


def test_random_labels_score_about_0_adjusted():
    embeddings, _ = class_centres_with_noise(num_classes=8)
    labels = torch.randint(8, (160,), generator=torch.Generator().manual_seed(2))
    scores = clustering_scores(embeddings, labels)
    assert abs(scores["adjusted_mutual_information"]) < 0.05 < scores["normalized_mutual_information"]


def test_cosine_does_not_depend_on_lengths():
    embeddings, labels = class_centres_with_noise()
    lengths = torch.logspace(-20, 20, 60).unsqueeze(1)
    assert clustering_scores(embeddings * lengths, labels) == clustering_scores(embeddings, labels)
    assert clustering_scores(embeddings * lengths, labels, distance="euclidean") != clustering_scores(
        embeddings, labels
    )


def test_the_seed_determines_the_result():
    embeddings = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(80) % 5
    results = [clustering_scores(embeddings, labels, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1.0], [math.nan]], [0, 1]), {}, "embeddings contain NaN"),
        (([[1.0], [0.0]], [0, 1]), {}, "all-zero embedding, which has no cosine"),
        (([[1.0], [2.0]], [0]), {}, "2 embeddings but 1 labels"),
        (([[1.0], [2.0]], [0.5, 1]), {}, "labels must be integers"),
        (([1.0], [0]), {}, r"embeddings must be real numbers of shape \[N, D\]"),
        (
            ([[1.0], [2.0]], [0, 1]),
            {"num_clusters": 3},
            "num_clusters must lie between 1 and the number of embeddings, 2, got 3",
        ),
        (([[1.0], [2.0]], [0, 1]), {"num_clusters": 1.5}, "num_clusters must be a whole number, got 1.5"),
        (([[1.0], [2.0]], [0, 1]), {"num_clusters": True}, "num_clusters must be a whole number, got True"),
        (([[1.0], [2.0]], [0, 1]), {"seed": -1}, "seed must be a whole number >= 0 and <= 4294967295, got -1"),
        (([[1.0], [2.0]], [0, 1]), {"seed": "0"}, "seed must be a whole number >= 0"),
        (([[1.0], [2.0]], [True, False]), {}, "labels must be integers"),
        (([[1.0], [2.0]], [0, 1]), {"distance": None}, "one of cosine, euclidean for clustering, got None"),
        (([[1.0], [2.0]], [0, 1]), {"distance": "inner_product"}, "one of cosine, euclidean for clustering"),
    ],
)
def test_bad_input_is_one_sentence(arguments, options, message):
    with pytest.raises(UserError, match=message):
        clustering_scores(*arguments, **options)
