import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import average_precision, ranked_relevance

from mas_embed import UserError
from mas_embed.facts.metrics import evaluate_fact_recognition, evaluate_fact_retrieval

recognise = partial(evaluate_fact_recognition, distance="euclidean")

# Facts by the values of their slots, one number a slot; None is a wildcard
ANIMALS = [(0, None, None), (0, 5, None), (0, 5, 2), (3, None, None), (3, 5, 2)]


def table(facts):
    vectors = torch.tensor([[[float(value or 0)] for value in fact] for fact in facts])
    weights = torch.tensor([[float(value is not None) for value in fact] for fact in facts])
    return vectors, weights


def distance(image, fact):
    """Over the slots that the fact fills; both are three lists of numbers, wildcards None."""
    return math.sqrt(
        sum((a - b) ** 2 for part, slot in zip(image, fact, strict=True) if slot is not None for a, b in zip(part, slot, strict=True))
    )  # fmt: skip


def cosine_distance(image, fact):
    a = [number for slot in image for number in slot]
    b = [
        number
        for part, slot in zip(image, fact, strict=True)
        for number in (slot if slot is not None else [0.0] * len(part))
    ]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return -dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def extends(fact, other):
    return all(wanted is None or given == wanted for given, wanted in zip(fact, other, strict=True))


def found_at_100(scores, is_relevant):
    """The release's loop over the first hundred ranks."""
    precisions, num_hits = [], 0
    for rank, relevant in enumerate(ranked_relevance(scores, is_relevant)[:100], start=1):
        if relevant:
            num_hits += 1
            precisions.append(num_hits / rank)
    return sum(precisions) / num_hits if num_hits else 0.0


def random_case(seed, num_facts=12, num_images=60, size=2, low=-1, high=2):
    """Small integers, so that there are ties; slots are filled at random, the subject always."""
    generator = np.random.default_rng(seed)
    facts = []
    while len(facts) < num_facts:
        order = generator.integers(1, 4)
        fact = [generator.integers(low, high, size).tolist() if slot < order else None for slot in range(3)]
        facts.append(fact)
    images = generator.integers(low, high, (num_images, 3, size))
    labels = generator.integers(num_facts - 1, size=num_images)  # the last fact has no image
    vectors = torch.tensor([[slot or [0] * size for slot in fact] for fact in facts], dtype=torch.float64)
    weights = torch.tensor([[float(slot is not None) for slot in fact] for fact in facts])
    embeddings = torch.tensor(images).double().flatten(1)
    return facts, images.tolist(), torch.tensor(labels), embeddings, vectors, weights


def test_retrieval_by_hand():
    vectors, weights = table([(0, None, None), (4, 5, None)])
    #   distance to fact 0 (subject alone): 1, 3, 2; to fact 1 (subject, predicate): 3, 1, sqrt(4 + 9)
    images = torch.tensor([[1.0, 5.0, 9.0], [3.0, 5.0, 9.0], [2.0, 8.0, 9.0]])
    scores = evaluate_fact_retrieval(images, torch.tensor([0, 0, 1]), vectors, weights)
    # Fact 0: ranks 1 and 3 of three; fact 1: its image is the last
    assert scores.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 3])
    assert scores.mean_average_precision == pytest.approx((5 / 6 + 1 / 3) / 2)
    assert scores.by_order == {1: pytest.approx(5 / 6), 2: pytest.approx(1 / 3)}
    assert scores.num_skipped == 0
    # Under "extending" the image of fact 1 would be relevant to fact 0 if it had fact 0's subject
    vectors[1, 0] = 0
    scores = evaluate_fact_retrieval(images, torch.tensor([0, 0, 1]), vectors, weights, match="extending")
    assert scores.average_precision[0] == 1


def test_the_numbers_of_a_wildcard_do_not_count():
    vectors, weights = table(ANIMALS)
    images, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    for evaluate, anything in itertools.product((evaluate_fact_retrieval, recognise), (77.0, math.nan, math.inf)):
        filled = torch.where(weights[:, :, None] > 0, vectors, anything)
        first, second = evaluate(images, labels, vectors, weights), evaluate(images, labels, filled, weights)
        assert repr(first) == repr(second)


def test_found_at_100_differs_from_the_average_precision_beyond_rank_100():
    vectors, weights = table([(0, None, None), (1000, None, None)])
    # 150 images in a row; those at ranks 1, 4 and 120 show fact 0
    images = torch.zeros(150, 3)
    images[:, 0] = torch.arange(150)
    labels = torch.ones(150, dtype=torch.long)
    labels[[0, 3, 119]] = 0
    scores = evaluate_fact_retrieval(images, labels, vectors, weights)
    assert scores.average_precision[0] == pytest.approx((1 + 2 / 4 + 3 / 120) / 3)
    assert scores.average_precision_found_at_100[0] == pytest.approx((1 + 2 / 4) / 2)
    # None of three images among the first hundred
    labels = torch.ones(150, dtype=torch.long)
    labels[147:] = 0
    scores = evaluate_fact_retrieval(images, labels, vectors, weights)
    assert scores.average_precision_found_at_100[0] == 0 < scores.average_precision[0]


@pytest.mark.parametrize("match", ["same", "extending"])
@pytest.mark.parametrize("seed", range(4))
def test_retrieval_equals_the_loops(seed, match):
    facts, images, labels, embeddings, vectors, weights = random_case(seed, num_images=130)
    scores = evaluate_fact_retrieval(embeddings, labels, vectors, weights, match=match)
    expected, expected_found, by_order = [], [], {}
    for row, fact in enumerate(facts):
        negative = [-distance(image, fact) for image in images]
        relevant = [label == row if match == "same" else extends(facts[label], fact) for label in labels.tolist()]
        expected.append(average_precision(negative, relevant))
        expected_found.append(found_at_100(negative, relevant) if any(relevant) else math.nan)
        if any(relevant):
            by_order.setdefault(sum(slot is not None for slot in fact), []).append(expected[-1])
    assert scores.average_precision.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert scores.average_precision_found_at_100.tolist() == pytest.approx(expected_found, rel=1e-12, nan_ok=True)
    assert scores.mean_average_precision == pytest.approx(np.nanmean(expected))
    assert scores.mean_average_precision_found_at_100 == pytest.approx(np.nanmean(expected_found))
    assert scores.by_order == pytest.approx({order: np.mean(values) for order, values in by_order.items()})
    assert scores.num_skipped == np.isnan(expected).sum()


def test_arrays_and_lists_are_as_good_as_tensors():
    vectors, weights = table(ANIMALS)
    images, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    given = images, labels, vectors, weights
    for evaluate in (evaluate_fact_retrieval, evaluate_fact_recognition):
        expected = repr(evaluate(*given, facts=torch.arange(5)))
        assert repr(evaluate(*(value.numpy() for value in given), facts=np.arange(5))) == expected
        assert repr(evaluate(images, *(value.tolist() for value in given[1:]), facts=list(range(5)))) == expected


def test_collapsed_embeddings_give_the_prevalence():
    vectors, weights = table(ANIMALS)
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 4, 4])
    scores = evaluate_fact_retrieval(torch.zeros(8, 3), labels, vectors, weights)
    assert scores.average_precision.tolist() == pytest.approx([3 / 8, 1 / 8, 1 / 8, 1 / 8, 2 / 8])


def test_facts_that_are_not_queried_have_no_score_though_images_extend_them():
    vectors, weights = table(ANIMALS)
    embeddings = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    labels = 2 + torch.arange(12) % 3
    scores = evaluate_fact_retrieval(embeddings, labels, vectors, weights, facts=labels, match="extending")
    assert np.isnan(scores.average_precision[:2]).all()
    assert np.isfinite(scores.average_precision[2:]).all()
    assert scores.num_skipped == 0


def test_recognition_by_hand():
    vectors, weights = table([(0, None, None), (0, 5, None), (0, 5, 2), (3, None, None)])
    # Distances to the four facts: .5, sqrt(.5), sqrt(.75), 2.5 | 2, sqrt(8), sqrt(12), 1 | 0, 0, 0, 3
    images = torch.tensor([[0.5, 5.5, 2.5], [2.0, 7.0, 4.0], [0.0, 5.0, 2.0]])
    assert recognise(images, torch.tensor([0, 0, 0]), vectors, weights).rank.tolist() == [1, 2, 1]
    # Of <0, 5> that fact and <0, 5, 2> are true, of <0, 5, 2> itself alone
    assert recognise(images, torch.tensor([1, 1, 1]), vectors, weights).rank.tolist() == [2, 3, 2]
    scores = recognise(images, torch.tensor([2, 2, 2]), vectors, weights)
    assert scores.rank.tolist() == [3, 4, 3]
    assert scores.hits_at == {1: 0.0, 5: 1.0, 10: 1.0}
    assert scores.mean_reciprocal_rank == pytest.approx((1 / 3 + 1 / 4 + 1 / 3) / 3)


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", range(4))
def test_recognition_equals_the_loops(seed, kind):
    # Small integers, whose distances are exact, so that there are ties; random numbers for cosine, which rounds
    facts, images, labels, embeddings, vectors, weights = random_case(
        seed, low=-1 if kind == "euclidean" else 1, num_facts=25
    )
    if kind == "cosine":
        embeddings = embeddings + torch.rand(
            embeddings.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        images = embeddings.unflatten(1, (3, -1)).tolist()
    scores = recognise(embeddings, labels, vectors, weights, distance=kind)
    measure = distance if kind == "euclidean" else cosine_distance
    expected = []
    for image, label in zip(images, labels.tolist(), strict=True):
        is_true = [extends(fact, facts[label]) for fact in facts]
        negative = [-round(measure(image, fact), 12) for fact in facts]
        expected.append(1 + ranked_relevance(negative, is_true).index(True))
    assert scores.rank.tolist() == expected
    assert scores.hits_at[5] == pytest.approx(np.mean([rank <= 5 for rank in expected]))
    assert scores.mean_reciprocal_rank == pytest.approx(np.mean([1 / rank for rank in expected]))


def test_recognition_among_some_facts():
    _, _, labels, embeddings, vectors, weights = random_case(0)
    few = labels < 4
    some = recognise(embeddings[few], labels[few], vectors, weights, facts=torch.arange(4))
    alone = recognise(embeddings[few], labels[few], vectors[:4], weights[:4])
    assert some.rank.tolist() == alone.rank.tolist()
    with pytest.raises(UserError, match="the fact of every image must be among the facts that are ranked"):
        recognise(embeddings, labels, vectors, weights, facts=torch.arange(4))


def test_blocks_change_nothing(monkeypatch):
    _, _, labels, embeddings, vectors, weights = random_case(0)
    evaluations = (evaluate_fact_retrieval, recognise)
    whole = [repr(evaluate(embeddings, labels, vectors, weights)) for evaluate in evaluations]
    monkeypatch.setattr("mas_embed.facts.metrics.BLOCK_ELEMENTS", 1)
    assert [repr(evaluate(embeddings, labels, vectors, weights)) for evaluate in evaluations] == whole


def test_arguments_that_do_not_fit_are_refused():
    vectors, weights = table(ANIMALS)
    images, labels = torch.randn(4, 3), torch.arange(4)
    for evaluate in (evaluate_fact_retrieval, recognise):
        with pytest.raises(UserError, match=r"facts need vectors \[F, 3, V\] .* got \[5, 3\], \[5, 3\]"):
            evaluate(images, labels, vectors[:, :, 0], weights)
        with pytest.raises(UserError, match=r"images need embeddings \[N, 3\], got \[4, 2\]"):
            evaluate(images[:, :2], labels, vectors, weights)
        with pytest.raises(UserError, match="there are 4 embeddings but 3 labels"):
            evaluate(images, labels[:3], vectors, weights)
        with pytest.raises(UserError, match="labels must be integers of shape"):
            evaluate(images, labels.double(), vectors, weights)
        for facts in ([0, 1, 2, 3, 5], [-1, 0, 1, 2, 3]):
            with pytest.raises(
                UserError, match=f"facts must be rows of the table of 5 facts, got {facts[0]} to {facts[-1]}"
            ):
                evaluate(images, labels, vectors, weights, facts=torch.tensor(facts))
        for wrong in (-weights, weights / 0, weights * (torch.arange(5) > 0)[:, None]):
            with pytest.raises(
                UserError, match="the weights of facts must be finite and >= 0, and every fact needs a slot"
            ):
                evaluate(images, labels, vectors, wrong)
        with pytest.raises(UserError, match="the vectors of facts contain NaN"):
            evaluate(images, labels, vectors / 0, weights)
        with pytest.raises(UserError, match="at least one embedding"):
            evaluate(images[:0], labels[:0], vectors, weights)
        with pytest.raises(UserError, match="labels must be rows of the table of 5 facts, got 2 to 5"):
            evaluate(images, labels + 2, vectors, weights)
        with pytest.raises(UserError, match="NaN or infinite"):
            evaluate(images / 0, labels, vectors, weights)
    with pytest.raises(UserError, match="none of the queried facts has a relevant image"):
        evaluate_fact_retrieval(images, labels, vectors, weights, facts=torch.tensor([4]))
    with pytest.raises(UserError, match="match must be one of same, extending, got 'all'"):
        evaluate_fact_retrieval(images, labels, vectors, weights, match="all")
    with pytest.raises(UserError, match="distance must be one of euclidean, cosine, got 'l1'"):
        recognise(images, labels, vectors, weights, distance="l1")


def test_cosine_favours_no_order():
    # An image right at <3, 5, 2>: the fact itself is nearest, though <3> is as near over the slot that it fills
    vectors, weights = table(ANIMALS)
    vectors = vectors + 1
    image, label = torch.tensor([[4.0, 6.0, 3.0]]), torch.tensor([4])
    assert evaluate_fact_recognition(image, label, vectors, weights).rank.tolist() == [1]
    assert recognise(image, label, vectors, weights).rank.tolist() == [2]


@pytest.mark.parametrize("noise", [0.0, 1e-17, -1e-8])
def test_a_vector_that_is_zero_up_to_rounding_has_the_cosine_0(noise):
    # <cat>, <cat, on> and <cat, under> after centring: all have the same subject, so its vector is zero
    vectors = torch.tensor([[[noise], [0.0], [0.0]], [[noise], [0.5], [0.0]], [[noise], [-0.5], [0.0]]])
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    images = torch.tensor([[0.0, 3.0, 0.0], [-1.0, 3.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    scores = evaluate_fact_recognition(images, torch.tensor([1, 2, 0, 1]), vectors, weights)
    # Cosines 0, 1, -1 for all but the last image; all facts are true of <cat>; the zero image ties, and false ones come first
    assert scores.rank.tolist() == [1, 3, 1, 3]
    alone = evaluate_fact_recognition(images[3:], torch.tensor([1]), vectors, weights, facts=torch.tensor([0, 1]))
    assert alone.rank.tolist() == [2]
