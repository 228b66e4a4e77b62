import json
import math
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mas_embed import UserError
from mas_embed.retrieval import evaluate_retrieval
from mas_embed.retrieval.compatibility import IndexUpdate, compare_indexes
from mas_embed.retrieval.compensation import ProcrustesCompensation

DISTANCES = ["cosine", "euclidean", "inner_product"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def space(size=6, num_classes=5):
    """Queries and gallery near the centres of their classes, and items to fit compensations on."""
    centres = random(num_classes, size, seed=9)
    labels = {"queries": torch.arange(20) % num_classes, "gallery": torch.arange(60) % num_classes}
    old = {
        name: centres[of_split] + 0.2 * random(len(of_split), size, seed=len(of_split))
        for name, of_split in labels.items()
    }
    return SimpleNamespace(**old, fit=random(80, size, seed=3), labels=tuple(labels.values()))


def rotation(size, seed=1):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def compare(before, change, **options):
    """Compares the old embeddings with those that `change` returns for them."""
    options = {"fit_on": (before.fit, change(before.fit))} | options
    queries, gallery = (before.queries, change(before.queries)), (before.gallery, change(before.gallery))
    return compare_indexes(*queries, *gallery, *before.labels, **options)


@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_models_keep_the_gallery(distance):
    result = compare(space(), torch.clone, distance=distance)
    assert result.verdict == "keep"
    assert result.old.as_dict() == result.new.as_dict() == result.mixed.as_dict()
    assert result.churn == result.churn_re_embedded == 0
    assert (result.drift == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_rotated_space_is_restored_by_compensation(distance):
    before, turn = space(), rotation(6)
    result = compare(before, lambda rows: rows @ turn, distance=distance)
    assert result.verdict == "compensate"
    assert result.compensation in ("procrustes", "ridge")
    assert result.new.mean_average_precision == pytest.approx(result.old.mean_average_precision, abs=1e-9)
    assert result.mixed.mean_average_precision < result.new.mean_average_precision - 0.1
    assert result.compensated["procrustes"].per_query["average_precision"] == pytest.approx(
        result.new.per_query["average_precision"], abs=1e-6
    )
    assert result.compensated["ridge"].mean_average_precision > result.new.mean_average_precision - 0.01
    assert result.churn > 0.2
    assert result.churn_re_embedded == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_an_unrelated_model_needs_a_new_gallery(distance):
    before = space()
    unrelated = space()
    shuffled = torch.randperm(5, generator=torch.Generator().manual_seed(4)).roll(1)
    for name, labels in zip(("queries", "gallery"), before.labels, strict=True):
        setattr(unrelated, name, random(5, 6, seed=77)[shuffled[labels]] + 0.1 * random(len(labels), 6, seed=5))
    result = compare_indexes(
        before.queries,
        unrelated.queries,
        before.gallery,
        unrelated.gallery,
        *before.labels,
        distance=distance,
        fit_on=(before.fit, random(80, 6, seed=6)),
    )
    assert result.verdict == "re-embed"
    assert max(scores.mean_average_precision for scores in result.compensated.values()) < 0.6
    assert result.new.mean_average_precision > 0.8


def test_scores_are_those_of_evaluate_retrieval():
    before, after = space(), space()
    after.queries, after.gallery = before.queries + 0.3 * random(20, 6, seed=7), before.gallery @ rotation(6)
    options = {"query_ids": torch.arange(20), "gallery_ids": torch.arange(60), "distance": "euclidean"}
    result = compare_indexes(
        before.queries, after.queries, before.gallery, after.gallery, *before.labels, **options, fit_on=None
    )
    for scores, queries, gallery in (
        (result.old, before.queries, before.gallery),
        (result.new, after.queries, after.gallery),
        (result.mixed, after.queries, before.gallery),
    ):
        expected = evaluate_retrieval(queries, before.labels[0], gallery, before.labels[1], **options)
        assert scores.as_dict() == expected.as_dict()
    assert result.compensated == {}
    assert result.compensation is None


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_drift_and_churn_equal_the_loops(distance, by_id):
    before, k = space(), 4
    queries, gallery = before.queries + 0.5 * random(20, 6, seed=7), before.gallery + 0.5 * random(60, 6, seed=8)
    ids = (torch.arange(20) + 5, torch.arange(60) // 2) if by_id else (None, None)  # two gallery items have the same id
    result = compare_indexes(
        before.queries, queries, before.gallery, gallery, *before.labels,
        distance=distance, k=k, query_ids=ids[0], gallery_ids=ids[1],
    )  # fmt: skip

    def score(one, other):
        product, lengths = sum(a * b for a, b in zip(one, other, strict=True)), math.hypot(*one) * math.hypot(*other)
        return {"cosine": product / lengths, "euclidean": -math.dist(one, other), "inner_product": product}[distance]

    def nearest(queries, gallery):
        found = []
        for query, row in enumerate(queries.tolist()):
            items = [item for item in range(60) if not by_id or ids[1][item] != ids[0][query]]
            found.append(set(sorted(items, key=lambda item: -score(row, gallery[item].tolist()))[:k]))
        return found

    old = nearest(before.queries, before.gallery)
    for churn, found in (
        (result.churn, nearest(queries, before.gallery)),
        (result.churn_re_embedded, nearest(queries, gallery)),
    ):
        assert churn == pytest.approx(1 - sum(len(a & b) for a, b in zip(old, found, strict=True)) / (20 * k))
        assert 0 < churn < 1
    pairs = list(zip(before.gallery.tolist(), gallery.tolist(), strict=True))
    drift = [1 - score(*pair) if distance == "cosine" else math.dist(*pair) for pair in pairs]
    np.testing.assert_allclose(result.drift, drift, rtol=1e-9)
    assert result.mean_drift == pytest.approx(sum(drift) / 60)
    assert result.drift_quantiles[0.5] == pytest.approx((sorted(drift)[29] + sorted(drift)[30]) / 2)


def test_cosine_does_not_depend_on_lengths():
    before, turn, lengths = space(), rotation(6), torch.logspace(-9, 9, 60, dtype=torch.float64).unsqueeze(1)
    expected = compare(before, lambda rows: rows @ turn)
    before.gallery = before.gallery * lengths
    result = compare(before, lambda rows: rows @ turn)
    np.testing.assert_allclose(result.drift, expected.drift)
    for name, scores in expected.compensated.items():
        assert result.compensated[name].as_dict() == pytest.approx(scores.as_dict())


def test_the_verdict_depends_on_the_tolerance():
    before = space()
    change = {"fit_on": None, "distance": "euclidean"}
    moved = lambda rows: rows + 0.9  # noqa: E731
    strict, loose = compare(before, moved, tolerance=0, **change), compare(before, moved, tolerance=0.9, **change)
    gap = strict.new.mean_average_precision - strict.mixed.mean_average_precision
    assert 0 < gap < 0.9
    assert (strict.verdict, loose.verdict) == ("re-embed", "keep")
    assert "no compensation was tried" in strict.reason
    at_the_gap = compare(before, moved, tolerance=gap + 1e-12, **change)
    assert at_the_gap.verdict == "keep"


def test_the_reason_mentions_an_update_that_hurts():
    before = space()
    result = compare(before, lambda rows: rows + 3 * random(*rows.shape, seed=len(rows)))
    assert result.new.mean_average_precision < result.old.mean_average_precision - 0.1
    assert "the old model on its own gallery was better" in result.reason


def test_custom_estimators_by_name():
    turn = rotation(6)
    result = compare(space(), lambda rows: rows @ turn, compensate={"mine": ProcrustesCompensation()})
    assert list(result.compensated) == ["mine"]
    assert result.compensation == "mine"


def test_summary_holds_the_metrics_by_name_and_the_quantiles():
    turn = rotation(6)
    result = compare(space(), lambda rows: rows @ turn, k=4)
    update = result.summary(after="split 2")
    assert isinstance(update, IndexUpdate)
    assert (update.after, update.k, update.verdict) == ("split 2", 4, "compensate")
    assert update.old_on_old == result.old.as_dict()
    assert update.new_on_new == result.new.as_dict()
    assert update.new_on_old == result.mixed.as_dict()
    assert update.compensated == {name: scores.as_dict() for name, scores in result.compensated.items()}
    assert (update.churn, update.churn_re_embedded) == (result.churn, result.churn_re_embedded)
    assert (update.compensation, update.reason) == (result.compensation, result.reason)
    assert update.drift.mean == pytest.approx(sum(result.drift.tolist()) / 60)
    assert list(update.drift.quantiles) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    in_order = sorted(result.drift.tolist())
    assert update.drift.quantiles["0.5"] == pytest.approx((in_order[29] + in_order[30]) / 2)


def test_as_dict_is_the_summary_without_a_name_and_survives_json():
    turn = rotation(6)
    result = compare(space(), lambda rows: rows @ turn)
    dictionary = result.as_dict()
    assert list(dictionary) == [field.name for field in fields(IndexUpdate) if field.name != "after"]
    assert dictionary | {"after": "any"} == asdict(result.summary(after="any"))
    assert json.loads(json.dumps(dictionary)) == dictionary


def test_the_text_shows_verdict_scores_drift_and_churn():
    turn = rotation(6)
    text = str(compare(space(), lambda rows: rows @ turn))
    assert text.startswith("compensate: new queries reach a mAP of 0.")
    assert "not within 0.01 of the" in text
    for name in (
        "old on old",
        "new on new",
        "new on old",
        "new on old, drift",
        "drift of the gallery",
        "of the 10 nearest",
    ):
        assert name in text
    assert max(map(len, text.splitlines()[1:])) <= 100


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"new_gallery": random(60, 5)},
            {},
            r"gallery must be embeddings of the same items, of equal size, got \[60, 6\] and \[60, 5\]",
        ),
        ({"new_queries": random(19, 6)}, {}, "old and new queries must be embeddings of the same items"),
        ({"new_queries": random(20, 6) * torch.nan}, {}, "new queries contain NaN"),
        ({}, {"fit_on": (random(3, 6), random(2, 6))}, "old and new fit_on must be embeddings of the same items"),
        ({}, {"fit_on": (random(3, 6), torch.zeros(3, 6))}, "new fit_on contain an all-zero embedding"),
        (
            {},
            {"fit_on": (random(3, 6),) * 2, "compensate": ["rigde"]},
            "unknown compensation 'rigde': did you mean 'ridge'",
        ),
        ({}, {"fit_on": (random(3, 5),) * 2}, "the gallery has 6 dimensions, but the compensation was fitted on 5"),
        ({}, {"k": 61}, "k must lie between 1 and the 60 gallery items left for a query, got 61"),
        ({}, {"k": 60, "query_ids": range(20), "gallery_ids": range(60)}, "the 59 gallery items left"),
        ({}, {"tolerance": -0.1}, "tolerance must be >= 0, got -0.1"),
        ({}, {"tolerance": float("nan")}, "tolerance must be a finite number, got nan"),
        ({}, {"tolerance": "0"}, "tolerance must be a finite number, got '0'"),
        ({}, {"k": 2.5}, "k must be a whole number, got 2.5"),
        ({}, {"k": True}, "k must be a whole number, got True"),
        ({}, {"fit_on": random(3, 6)}, "fit_on must be a pair"),
        ({}, {"fit_on": (random(3, 6),)}, "fit_on must be a pair"),
        (
            {},
            {"fit_on": (random(3, 6),) * 2, "compensate": "drift"},
            "compensate must be a list of names, .* got 'drift'",
        ),
        ({}, {"fit_on": (random(3, 6),) * 2, "compensate": None}, "compensate must be a list of names, .* got None"),
        ({}, {"fit_on": (random(3, 6),) * 2, "compensate": {"a": 1}}, "'a' must have methods fit and transform, got 1"),
        ({}, {"query_ids": range(20)}, "query_ids and gallery_ids go together"),
        ({}, {"distance": "manhattan"}, "distance must be one of"),
    ],
)
def test_bad_input_is_one_sentence(changes, options, message):
    before = space()
    embeddings = {
        "old_queries": before.queries,
        "new_queries": before.queries,
        "old_gallery": before.gallery,
        "new_gallery": before.gallery,
    }
    with pytest.raises(UserError, match=message):
        compare_indexes(*(embeddings | changes).values(), *before.labels, **options)
