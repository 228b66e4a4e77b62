import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import average_precision, cut_measures, ranked_relevance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import average_precision_score

from mas_embed import UserError, evaluate_retrieval
from mas_embed.retrieval import ranking
from mas_embed.retrieval.similarity import ApproximateScores

KS = (1, 2, 4, 8)


@pytest.fixture(params=["sorted", "counted"], autouse=True)
def ranking_method(request, monkeypatch):
    """Every test in this file runs with both methods of ranking."""
    monkeypatch.setattr("mas_embed.retrieval.ranking.DENSE_SHARE", {"sorted": 0.0, "counted": 1.0}[request.param])
    return request.param


def scores_of(queries, gallery, distance):
    queries, gallery = np.asarray(queries, dtype=np.float64), np.asarray(gallery, dtype=np.float64)
    if distance == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    if distance == "euclidean":
        return -((queries[:, None] - gallery[None]) ** 2).sum(2)
    return queries @ gallery.T


def data(num_queries=30, num_gallery=50, size=5, num_classes=4, seed=0, low=-3, high=4):
    """Small integers: many ties, and every sum exact in float32."""
    generator = np.random.default_rng(seed)
    queries = generator.integers(low, high, (num_queries, size)).astype(np.float32)
    gallery = generator.integers(low, high, (num_gallery, size)).astype(np.float32)
    return (
        queries,
        generator.integers(num_classes, size=num_queries),
        gallery,
        generator.integers(num_classes, size=num_gallery),
    )


def assert_equals_oracles(result, scores, is_relevant, is_ranked=None):
    """Compares every value of every query with the loops; items that are False in `is_ranked` [Q, G] are left out."""
    for query in range(len(scores)):
        ranked = is_ranked[query] if is_ranked is not None else np.ones(scores.shape[1], dtype=bool)
        query_scores, query_relevant = scores[query][ranked].tolist(), is_relevant[query][ranked].tolist()
        if not any(query_relevant):
            assert all(np.isnan(values[query]) for values in result.per_query.values())
            continue
        expected = cut_measures(query_scores, query_relevant, result.recall_at)
        expected["average_precision"] = average_precision(query_scores, query_relevant)
        assert {name: values[query] for name, values in result.per_query.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", ["inner_product", "euclidean"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_and_the_loops_with_ties(distance, seed):
    queries, query_labels, gallery, gallery_labels = data(seed=seed)
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance=distance)
    scores, is_relevant = scores_of(queries, gallery, distance), query_labels[:, None] == gallery_labels
    assert any(len(np.unique(row)) < len(row) for row in scores)
    expected = [average_precision_score(relevant, row) for relevant, row in zip(is_relevant, scores, strict=True)]
    np.testing.assert_allclose(result.per_query["average_precision"], expected, rtol=1e-12)
    assert_equals_oracles(result, scores, is_relevant)


def test_cosine_equals_scikit_learn_on_continuous_data():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (20, 60))
    query_labels, gallery_labels = torch.arange(20) % 3, torch.arange(60) % 3
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    scores, is_relevant = scores_of(queries, gallery, "cosine"), (query_labels[:, None] == gallery_labels).numpy()
    assert_equals_oracles(result, scores, is_relevant)
    assert result.mean_average_precision == pytest.approx(np.mean(result.per_query["average_precision"]))
    assert result.recall_at.keys() == set(KS)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from(["inner_product", "euclidean"]),
)
def test_any_small_case_equals_the_loops(seed, num_queries, num_gallery, size, distance):
    queries, query_labels, gallery, gallery_labels = data(
        num_queries, num_gallery, size, num_classes=2, seed=seed, low=-1, high=2
    )
    is_relevant = query_labels[:, None] == gallery_labels
    if not is_relevant.any():
        with pytest.raises(UserError, match="no query has a relevant item"):
            evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance=distance)
        return
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance=distance)
    assert result.num_skipped == (~is_relevant.any(1)).sum()
    assert_equals_oracles(result, scores_of(queries, gallery, distance), is_relevant)


@pytest.mark.parametrize("distance", ["inner_product", "euclidean"])
def test_queries_as_gallery_leave_themselves_out_by_identity(distance):
    embeddings, labels, *_ = data(num_queries=40, num_classes=3, size=2)  # size 2: many duplicates of every point
    assert len(np.unique(embeddings, axis=0)) < 35
    result = evaluate_retrieval(embeddings, labels, distance=distance)
    is_ranked = ~np.eye(40, dtype=bool)
    assert_equals_oracles(result, scores_of(embeddings, embeddings, distance), labels[:, None] == labels, is_ranked)


def test_overlap_is_by_id_wherever_the_item_stands():
    embeddings, labels, more, more_labels = data(num_queries=20, num_gallery=15)
    shuffled = np.random.default_rng(1).permutation(35)
    gallery, gallery_labels = (
        np.concatenate([embeddings, more])[shuffled],
        np.concatenate([labels, more_labels])[shuffled],
    )
    ids = 1000 + np.arange(35)
    result = evaluate_retrieval(
        embeddings,
        labels,
        gallery,
        gallery_labels,
        query_ids=ids[:20],
        gallery_ids=ids[shuffled],
        distance="inner_product",
    )
    is_ranked = ids[:20, None] != ids[shuffled]
    assert_equals_oracles(
        result, scores_of(embeddings, gallery, "inner_product"), labels[:, None] == gallery_labels, is_ranked
    )


def test_the_order_of_the_gallery_changes_nothing():
    queries, query_labels, gallery, gallery_labels = data(size=2, num_gallery=80)
    order = np.random.default_rng(2).permutation(80)
    one = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance="euclidean")
    other = evaluate_retrieval(queries, query_labels, gallery[order], gallery_labels[order], distance="euclidean")
    for name, values in one.per_query.items():
        np.testing.assert_allclose(values, other.per_query[name], rtol=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_a_collapsed_model_scores_its_prevalence_and_gains_nothing_by_ties(distance):
    row = torch.randn(1, 7)
    gallery_labels = torch.tensor([0] * 30 + [1] * 70)
    result = evaluate_retrieval(row.expand(4, 7), [0, 0, 1, 1], row.expand(100, 7), gallery_labels, distance=distance)
    assert result.per_query["average_precision"] == pytest.approx([0.3, 0.3, 0.7, 0.7])
    assert result.precision_at_1 == result.recall_at[8] == 0
    assert result.per_query["reciprocal_rank"] == pytest.approx([1 / 71, 1 / 71, 1 / 31, 1 / 31])


def test_negative_scores_count_like_shifted_ones():
    generator = np.random.default_rng(0)
    gallery = generator.integers(1, 9, (50, 3)).astype(np.float32)
    labels = generator.integers(3, size=50)
    negative = evaluate_retrieval(-np.ones((3, 3)), [0, 1, 2], gallery, labels, distance="inner_product")
    shifted = evaluate_retrieval(
        np.column_stack([-np.ones((3, 3)), np.full(3, 100.0)]),
        [0, 1, 2],
        np.column_stack([gallery, np.ones(50)]),
        labels,
        distance="inner_product",
    )
    np.testing.assert_allclose(negative.per_query["average_precision"], shifted.per_query["average_precision"])


def test_labels_beyond_the_precision_of_float32():
    base = 2**40
    result = evaluate_retrieval([[1.0, 0.0]], [base], [[1.0, 0.1], [1.0, 0.2]], [base + 1, base])
    assert result.mean_average_precision == 0.5


def test_queries_without_a_relevant_item_are_left_out_and_counted():
    result = evaluate_retrieval([[1.0, 0.0], [0.0, 1.0]], [0, 7], [[1.0, 0.0], [0.0, 1.0]], [0, 1])
    assert (result.mean_average_precision, result.num_queries, result.num_skipped) == (1.0, 2, 1)
    assert np.isnan(result.per_query["average_precision"][1])


def test_means_by_group_by_hand():
    """The four queries' average precisions are 1, 1/2, none and 1/2."""
    queries, gallery = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.1, 1.0]]
    result = evaluate_retrieval(queries, [0, 1, 7, 0], gallery, [0, 1], recall_at=(1,))
    first, second, third, empty = result.means_by_group([2, 1, 1, 0])
    assert first["mean_average_precision"] == 3 / 4
    assert first["precision_at_1"] == first["recall_at_1"] == 1 / 2
    assert third["mean_average_precision"] == third["mean_reciprocal_rank"] == 1 / 2
    assert first.keys() == second.keys() == empty.keys() == result.means.keys()
    assert all(math.isnan(value) for means in (second, empty) for value in means.values())


def test_means_by_group_equal_separate_calls_bit_for_bit():
    """All classes of the gallery have the same size, so no query is padded and its sums have the same terms in every call."""
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(70, 5)), generator.normal(size=(120, 5))
    query_labels, gallery_labels = generator.integers(7, size=70), np.arange(120) % 6  # class 6 has no relevant item
    options = {"precision_at": (3,), "ndcg_at": (4,), "average_precision_at": (5,)}
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, **options)
    start, sizes = 0, [20, 1, 9, 40]
    for size, means in zip(sizes, result.means_by_group(sizes), strict=True):
        group = slice(start, start + size)
        alone = evaluate_retrieval(queries[group], query_labels[group], gallery, gallery_labels, **options)
        assert means == alone.means
        start += size


def test_one_group_of_all_queries_has_the_same_means():
    queries, query_labels, gallery, gallery_labels = data()
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    assert result.means_by_group([30]) == [result.means]


@pytest.mark.parametrize("sizes", [[], [29], [30, 1], [31, -1]])
def test_groups_that_do_not_hold_all_queries_are_refused(sizes):
    queries, query_labels, gallery, gallery_labels = data()
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    with pytest.raises(UserError, match=r"the sizes of the groups must be >= 0 and add up to 30, got \["):
        result.means_by_group(sizes)


def test_blocks_change_nothing(monkeypatch):
    queries, query_labels, gallery, gallery_labels = data()
    whole = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    monkeypatch.setattr("mas_embed.retrieval.metrics.MEBIBYTE", 3000)
    monkeypatch.setattr("mas_embed.retrieval.counting.SCORES_AT_ONCE", 150)
    in_blocks = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, memory_mib=1)
    for name, values in whole.per_query.items():
        np.testing.assert_allclose(values, in_blocks.per_query[name], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_at_cutoffs_equal_the_loops(seed):
    queries, query_labels, gallery, gallery_labels = data(seed=seed)
    result = evaluate_retrieval(
        queries, query_labels, gallery, gallery_labels,
        distance="inner_product", precision_at=(3, 200), ndcg_at=(5, 200), average_precision_at=(4, 200),
    )  # fmt: skip
    scores, is_relevant = scores_of(queries, gallery, "inner_product"), query_labels[:, None] == gallery_labels
    for query in range(len(queries)):
        ranked = ranked_relevance(scores[query].tolist(), is_relevant[query].tolist())
        expected = {}
        for k in (3, 200):
            expected[f"precision_at_{k}"] = sum(ranked[:k]) / k
        for k in (5, 200):
            gain = sum(1 / math.log2(2 + index) for index, hit in enumerate(ranked[:k]) if hit)
            expected[f"ndcg_at_{k}"] = gain / sum(1 / math.log2(2 + index) for index in range(min(k, sum(ranked))))
        for k in (4, 200):
            total = sum(sum(ranked[: index + 1]) / (index + 1) for index, hit in enumerate(ranked[:k]) if hit)
            expected[f"average_precision_at_{k}_over_relevant"] = total / sum(ranked)
            expected[f"average_precision_at_{k}_over_min"] = total / min(k, sum(ranked))
            expected[f"average_precision_at_{k}_over_found"] = total / max(1, sum(ranked[:k]))
        assert {name: result.per_query[name][query] for name in expected} == pytest.approx(expected, rel=1e-12)
        assert expected.keys() <= result.as_dict().keys()


def test_metrics_at_cutoffs_of_a_hand_computed_ranking():
    """Relevance by rank: no, yes, yes, no, yes."""
    gallery, relevant = [[5.0], [4.0], [3.0], [2.0], [1.0]], [[False, True, True, False, True]]
    result = evaluate_retrieval(
        [[1.0]], None, gallery, relevant=np.array(relevant), distance="inner_product",
        precision_at=(2,), ndcg_at=(2,), average_precision_at=(2,),
    )  # fmt: skip
    assert result.mean_average_precision == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert result.means["precision_at_2"] == 0.5
    assert result.means["ndcg_at_2"] == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
    assert result.means["average_precision_at_2_over_relevant"] == pytest.approx(1 / 6)
    assert result.means["average_precision_at_2_over_min"] == pytest.approx(1 / 4)
    assert result.means["average_precision_at_2_over_found"] == pytest.approx(1 / 2)


def test_relevance_in_every_form_is_the_same():
    queries, query_labels, gallery, gallery_labels = data()
    expected = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    table = query_labels[:, None] == gallery_labels
    ids = 5000 + np.random.default_rng(1).permutation(len(gallery))
    for relevant, options in [
        (table, {}),
        (torch.from_numpy(table), {}),
        (table.tolist(), {}),
        ([np.flatnonzero(row).tolist() for row in table], {}),
        ([ids[row].tolist() for row in table], {"gallery_ids": ids}),
    ]:
        result = evaluate_retrieval(queries, None, gallery, relevant=relevant, **options)
        for name, values in expected.per_query.items():
            np.testing.assert_array_equal(values, result.per_query[name])


def test_relevance_by_id_leaves_the_query_itself_out():
    rows = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]
    result = evaluate_retrieval(
        rows, None, rows, relevant=[[10, 12], [10], []], query_ids=[10, 11, 12], gallery_ids=[10, 11, 12]
    )
    assert result.num_skipped == 1
    np.testing.assert_allclose(result.per_query["average_precision"], [1 / 2, 1, np.nan])


def test_equals_pytorch_metric_learning_where_it_means_the_same():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(200, 8, generator=generator), torch.arange(200) % 13
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "r_precision", "precision_at_1", "mean_reciprocal_rank"),
        k="max_bin_count",
    )
    normalized = torch.nn.functional.normalize(embeddings)
    theirs = calculator.get_accuracy(normalized, labels)
    ours = evaluate_retrieval(embeddings, labels)
    assert ours.mean_average_precision_at_r == pytest.approx(theirs["mean_average_precision_at_r"], rel=1e-6)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], rel=1e-6)
    assert ours.precision_at_1 == pytest.approx(theirs["precision_at_1"], rel=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_counting_equals_sorting_on_a_gallery_with_near_ties(distance, monkeypatch):
    """Items so close to the relevant ones that float32 cannot tell them apart, exact duplicates, and classes of many sizes."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=(300, 16))
    gallery = np.concatenate([base, base, base + 1e-9 * generator.normal(size=base.shape)])
    labels = generator.geometric(0.05, size=len(gallery))
    results = []
    for share in (0.0, 1.0):
        monkeypatch.setattr("mas_embed.retrieval.ranking.DENSE_SHARE", share)
        results.append(evaluate_retrieval(gallery[:400], labels[:400], gallery, labels, distance=distance))
    for name, values in results[0].per_query.items():
        np.testing.assert_array_equal(values, results[1].per_query[name], err_msg=name)


def test_counting_needs_no_sorting_where_scores_differ(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gallery, labels = torch.randn(2000, 16, generator=generator), torch.arange(2000) % 100
    monkeypatch.setattr("mas_embed.retrieval.ranking.DENSE_SHARE", 1.0)
    monkeypatch.setattr("mas_embed.retrieval.ranking.Ranking._exact_scores_of_all", None)  # sorting calls it
    scores = evaluate_retrieval(gallery[:50], labels[:50], gallery, labels)
    assert 0 < scores.mean_average_precision < 1


def test_approximate_scores_beyond_their_error_bound_are_not_used(monkeypatch):
    queries, query_labels, gallery, gallery_labels = data()
    expected = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    real = ApproximateScores.__call__

    def rough(self, block):
        scores, offset, error = real(self, block)
        return scores.bfloat16().float(), offset, error

    monkeypatch.setattr(ApproximateScores, "__call__", rough)
    result = evaluate_retrieval(queries, query_labels, gallery, gallery_labels)
    for name, values in expected.per_query.items():
        np.testing.assert_array_equal(values, result.per_query[name])


def test_euclidean_survives_a_large_offset():
    queries, query_labels, gallery, gallery_labels = data(size=3)
    near = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance="euclidean")
    far = evaluate_retrieval(queries + 1e5, query_labels, gallery + 1e5, gallery_labels, distance="euclidean")
    for name, values in near.per_query.items():
        np.testing.assert_allclose(values, far.per_query[name])


def test_recall_beyond_the_gallery_takes_all_of_it():
    assert evaluate_retrieval([[1.0]], [0], [[-1.0], [1.0]], [0, 1], recall_at=(1, 100)).recall_at == {1: 0.0, 100: 1.0}


def test_names_of_all_means():
    result = evaluate_retrieval([[1.0], [1.0]], [0, 0], recall_at=(1, 3))
    assert result.as_dict().keys() == {
        "mean_average_precision", "mean_average_precision_at_r", "r_precision", "mean_reciprocal_rank", "precision_at_1", "recall_at_1", "recall_at_3",
    }  # fmt: skip


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_duplicates_tie_wherever_they_stand(distance, dtype):
    generator = np.random.default_rng(0)
    gallery = np.tile(generator.normal(size=(33, 7)).astype(dtype), (2, 1))
    labels = generator.integers(3, size=66)
    queries, query_labels = generator.normal(size=(9, 7)).astype(dtype), generator.integers(3, size=9)
    reference = evaluate_retrieval(queries, query_labels, gallery, labels, distance=distance)
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(66)
        other = evaluate_retrieval(queries, query_labels, gallery[order], labels[order], distance=distance)
        for name, values in reference.per_query.items():
            np.testing.assert_allclose(values, other.per_query[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float32, 1e-30), (np.float32, 1e30), (np.float64, 1e-160), (np.float64, 1e160)]
)
def test_the_scale_of_the_embeddings_changes_nothing(distance, dtype, scale):
    queries, query_labels, gallery, gallery_labels = data()
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=queries.shape), generator.normal(size=gallery.shape)
    reference = evaluate_retrieval(queries, query_labels, gallery, gallery_labels, distance=distance)
    scaled = [(rows.astype(dtype) * dtype(scale)).astype(dtype) for rows in (queries, gallery)]
    result = evaluate_retrieval(scaled[0], query_labels, scaled[1], gallery_labels, distance=distance)
    for name, values in reference.per_query.items():
        np.testing.assert_allclose(values, result.per_query[name], err_msg=name)


def test_lengths_that_differ_by_more_than_a_float_holds_lose_no_query():
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(60, 8)) * np.logspace(-120, 120, 60)[:, None], generator.integers(5, size=60)
    result = evaluate_retrieval(rows, labels, distance="inner_product")
    assert np.isfinite(result.per_query["average_precision"]).all()
    # The longest queries' products are all large enough to be told apart
    for query in range(50, 60):
        is_other = np.arange(60) != query
        expected = average_precision(
            (rows @ rows[query])[is_other].tolist(), (labels == labels[query])[is_other].tolist()
        )
        assert result.per_query["average_precision"][query] == pytest.approx(expected)


def test_integers_beyond_float32_keep_their_digits():
    base = 2**24
    result = evaluate_retrieval([[base, 0]], [1], [[base + 1, 0], [base, 1]], [0, 1], distance="euclidean")
    assert result.mean_average_precision == 0.5  # both at distance 1
    result = evaluate_retrieval([[base]], [1], [[base + 1], [base]], [0, 1], distance="euclidean")
    assert result.mean_average_precision == 1.0


def test_arrays_of_every_kind():
    expected = evaluate_retrieval(ROWS, LABELS)
    for rows in (
        np.array(ROWS)[::-1][::-1],
        np.array(ROWS, dtype=">f8"),
        np.array(ROWS, order="F"),
        torch.tensor(ROWS).half(),
    ):
        result = evaluate_retrieval(rows, np.array([0, 0], dtype=np.uint8), recall_at=np.array([1, 2, 4, 8]))
        assert result.as_dict() == expected.as_dict()


ROWS, LABELS = [[1.0, 0.0], [0.0, 1.0]], [0, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1.0, float("nan")]], [0], ROWS, LABELS), {}, "queries contain NaN"),
        ((ROWS, LABELS, [[1.0, float("inf")]], [0]), {}, "gallery contain NaN or infinite"),
        ((ROWS, LABELS, [[0.0, 0.0]], [0]), {}, "all-zero embedding, which has no cosine"),
        ((ROWS, LABELS, [[1.0, 0.0, 0.0]], [0]), {}, "2 dimensions and the gallery 3"),
        ((ROWS, [0]), {}, "2 embeddings but 1 query_labels"),
        ((ROWS, LABELS, ROWS), {}, "gallery and gallery_labels go together"),
        (
            (ROWS, LABELS, ROWS, LABELS),
            {"query_ids": [0, 1]},
            "query_ids and gallery_ids go together and require a gallery",
        ),
        ((ROWS, LABELS, np.zeros((0, 2)), []), {}, "gallery must hold at least one embedding"),
        ((ROWS, [0.5, 1.0]), {}, "query_labels must be integers"),
        (([1.0, 2.0], [0, 0]), {}, r"queries must be real numbers of shape \[N, D\], got torch.float64 of shape \[2\]"),
        ((ROWS, LABELS), {"distance": "manhattan"}, "distance must be one of cosine, euclidean, inner_product"),
        (([["a"]], [0]), {}, "queries must be an array of numbers"),
        (([[1.0], [1.0, 2.0]], LABELS), {}, "queries must be an array of numbers"),
        (([[1j, 0]], [0]), {}, "queries must be real numbers"),
        ((ROWS, [2**70, 0]), {}, "query_labels must be an array of numbers"),
        ((ROWS, LABELS), {"recall_at": (2.5,)}, "whole numbers >= 1"),
        ((ROWS, LABELS), {"recall_at": ()}, "whole numbers >= 1"),
        ((ROWS, LABELS), {"recall_at": (0,)}, "whole numbers >= 1"),
        ((ROWS, [0, 1]), {}, "no query has a relevant item"),
        ((ROWS, None), {}, "query_labels is None"),
        ((ROWS, LABELS), {"relevant": [[1], [0]]}, "relevant replaces the labels"),
        ((ROWS, None, ROWS), {"relevant": [[0]]}, "one row for each of the 2 queries, got 1"),
        ((ROWS, None, ROWS), {"relevant": [[0], [2]]}, "relevant lists the gallery item 2, which does not exist"),
        ((ROWS, None, ROWS), {"relevant": np.ones((2, 3), dtype=bool)}, r"must have shape \[2, 2\], got \[2, 3\]"),
        ((ROWS, None, ROWS), {"relevant": [[0], [0]], "gallery_ids": [4, 4]}, "gallery_ids must all differ"),
        ((ROWS, None, ROWS), {"relevant": [[0, 1], [1, 0]]}, "give it as booleans"),
        ((ROWS, LABELS), {"ndcg_at": (0,)}, "ndcg_at must hold whole numbers >= 1"),
        ((ROWS, LABELS), {"memory_mib": 0}, "memory_mib must be at least 1"),
        ((ROWS, LABELS), {"memory_mib": 1.5}, "memory_mib must be a whole number .*, got 1.5"),
        ((ROWS, LABELS), {"memory_mib": "1"}, "memory_mib must be a whole number .*, got '1'"),
        ((ROWS, LABELS), {"memory_mib": 2**80}, "memory_mib must be a whole number .*, got 1208"),
        *(
            ((ROWS, LABELS), {"recall_at": value}, "recall_at must hold whole numbers >= 1, got")
            for value in (
                (True,),
                None,
                "12",
                float("nan"),
                2.0,
                (2**63,),
                np.array(1),
                [[1]],
                {"a": 1},
                torch.tensor(1),
            )
        ),
        ((ROWS, [True, False]), {}, "query_labels must be integers"),
        ((ROWS, [[0], [0, 1]]), {}, "query_labels must be an array of numbers"),
        ((ROWS, np.array([2**64 - 1, 0], dtype=np.uint64)), {}, r"query_labels must be less than 2\^63"),
        ((np.array(ROWS) > 0, LABELS), {}, "queries must be real numbers of shape"),
        ((np.ma.masked_array(ROWS, True), LABELS), {}, "queries must be an array without a mask"),
        ((torch.tensor(ROWS).to_sparse(), LABELS), {}, "queries must be a dense tensor of numbers"),
        ((torch.tensor(ROWS, device="meta"), LABELS), {}, "queries must be a dense tensor of numbers"),
        ((torch.tensor(ROWS).to(torch.float8_e4m3fn), LABELS), {}, "queries must be a dense tensor of numbers"),
        *(
            (
                (ROWS, None, ROWS),
                {"relevant": value},
                "relevant must be a matrix of booleans, or one list of items a query",
            )
            for value in (3, "ab", np.array([0, 1]), [0, 1], [[[0]], [[1]]], {0: [0], 1: [1]}, np.zeros((2, 2, 2)) > 0)
        ),
        ((ROWS, None, ROWS), {"relevant": [["a"], ["b"]]}, "relevant items must be an array of numbers"),
        ((ROWS, None, ROWS), {"relevant": [[0.5], [1]]}, "relevant items must be integers"),
        ((ROWS, None, ROWS), {"relevant": [[None], [1]]}, "relevant items must be an array of numbers"),
        ((ROWS, None, ROWS), {"relevant": [[True, False], [1]]}, "relevant items must be integers"),
        ((ROWS, None, ROWS), {"relevant": [[True, False], [True]]}, "must have shape .* got rows of different lengths"),
    ],
)
def test_bad_input_is_one_sentence(arguments, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_retrieval(*arguments, **options)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_rows_are_sorted_alike_by_any_number_of_threads(monkeypatch, num_threads):
    monkeypatch.setattr(ranking, "SORTED_BY_ONE_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    scores = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:, ::5] = -torch.inf
    assert torch.equal(ranking._sorted_rows(scores.clone()), scores.sort(dim=1).values)


@pytest.mark.parametrize("sizes", [None, 3, 2.0, [1.0, 1.0], [True, True], ["2"], [3], [-1, 3]])
def test_sizes_of_groups_that_do_not_fit_are_refused(sizes):
    scores = evaluate_retrieval([[1.0, 0.0], [1.0, 0.1]], [0, 0])
    with pytest.raises(UserError, match="the sizes? of (the groups|a group) must be"):
        scores.means_by_group(sizes)
