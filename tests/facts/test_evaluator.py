"""The evaluator of facts, on a model that embeds an image as itself."""

from functools import partial

import numpy as np
import pytest
import torch
from small import Recorder, Stopped
from torch import nn

from mas_embed import Finetune, Recipe, UserError, train_sequence
from mas_embed.data import Part, Split, select_subset
from mas_embed.evaluation import BEFORE_FIRST
from mas_embed.facts import (
    FACT_METRICS,
    FactEvaluator,
    FactLoss,
    FactSequence,
    FactTable,
    evaluate_fact_recognition,
    evaluate_fact_retrieval,
    score_facts,
)
from mas_embed.training import SplitEnd

WORDS = [("cat", "", ""), ("cat", "runs", ""), ("dog", "", ""), ("dog", "runs", ""), ("cow", "eats", "hay")]
NUMBERS = {"": 0.0, "cat": 1.0, "dog": -1.0, "cow": 3.0, "runs": 2.0, "eats": -2.0, "hay": 1.0}
SPLITS = {"cats": [0, 1], "others": [2, 3, 4]}


def make_splits(noise=0.0, per_fact=3, seed=0):
    """Images that are the vectors of their facts plus noise."""
    vectors = torch.tensor([[[NUMBERS[word]] for word in words] for words in WORDS])
    weights = torch.tensor([[float(bool(word)) for word in words] for words in WORDS])
    facts = FactTable(torch.arange(len(WORDS)), WORDS, vectors, weights)
    generator = torch.Generator().manual_seed(seed)

    def part(rows):
        labels = torch.tensor(rows).repeat_interleave(per_fact)
        return Part(facts.targets[labels] + noise * torch.randn(len(labels), 3, generator=generator), labels)

    splits = [Split(name, part(rows), held_out := part(rows), held_out) for name, rows in SPLITS.items()]
    return FactSequence(splits, facts)


def evaluate(splits, **options):
    evaluator = FactEvaluator(splits.facts, batch_size=4, **options)
    return evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)


def gallery_of(splits):
    """Images and labels of several splits."""
    return (torch.cat([getattr(split.gallery, name) for split in splits]) for name in ("inputs", "labels"))


def test_a_split_is_scored_on_its_images_and_the_pooled_scores_on_all():
    splits = make_splits(noise=1.0)
    evaluation = evaluate(splits)
    scores, pooled = evaluation.scores, evaluation.pooled
    table = splits.facts.vectors, splits.facts.weights
    for index, split in enumerate(splits):
        alone = evaluate_fact_retrieval(split.gallery.inputs, split.gallery.labels, *table, facts=split.gallery.labels)
        assert scores["mean_average_precision"][index] == alone.mean_average_precision
        assert scores["mean_average_precision_found_at_100"][index] == alone.mean_average_precision_found_at_100
    images, labels = gallery_of(splits)
    together = evaluate_fact_retrieval(images, labels, *table)
    assert pooled["mean_average_precision"] == together.mean_average_precision
    assert pooled["mean_average_precision_order_1"] == together.by_order[1]
    assert pooled["image_to_fact_k1"] == evaluate_fact_recognition(images, labels, *table).hits_at[1]
    assert pooled["mean_average_precision"] < np.mean(scores["mean_average_precision"])
    euclidean = evaluate_fact_recognition(images, labels, *table, distance="euclidean")
    assert evaluate(splits, distance="euclidean").pooled["image_to_fact_mrr"] == euclidean.mean_reciprocal_rank


def test_orders_that_a_split_lacks_are_only_in_the_pooled_scores():
    evaluation = evaluate(make_splits())
    by_order = {"mean_average_precision_order_1", "mean_average_precision_order_2"}
    assert evaluation.scores.keys() == {*FACT_METRICS, *by_order}
    assert evaluation.pooled.keys() == evaluation.scores.keys() | {"mean_average_precision_order_3"}


def test_scores_by_hand():
    splits = make_splits()
    # <cat> fits the images of <cat, runs> as well: six equal distances, three of them right
    scores = score_facts(splits[0].gallery.inputs, splits[0].gallery.labels, splits.facts)
    assert scores["mean_average_precision_order_1"] == 0.5
    assert scores["mean_average_precision_order_2"] == 1.0
    assert scores["mean_average_precision"] == 0.75
    assert scores["mean_average_precision_extending"] == 1.0
    # Irrelevant first: 1/4, 2/5, 3/6
    assert scores["mean_average_precision_found_at_100"] == pytest.approx((1 + (0.25 + 0.4 + 0.5) / 3) / 2)
    assert scores["image_to_fact_k1"] == scores["image_to_fact_mrr"] == 1.0


def test_a_tracked_subset_is_scored_on_the_images_of_its_splits():
    splits = make_splits(noise=3.0, seed=1)
    subsets = {"cat": select_subset(splits, split="cats", labels=[0]), "cat of all": select_subset(splits, labels=[0])}
    tracked = evaluate(splits, track=list(subsets), subsets=subsets).details.tracked
    table = splits.facts.vectors, splits.facts.weights
    alone = evaluate_fact_retrieval(*gallery_of(splits[:1]), *table, facts=torch.tensor([0]))
    everywhere = evaluate_fact_retrieval(*gallery_of(splits), *table, facts=torch.tensor([0]))
    assert tracked["cat"] == alone.mean_average_precision
    assert tracked["cat of all"] == everywhere.mean_average_precision < alone.mean_average_precision
    assert evaluate(splits, subsets=subsets).details.tracked == {}


def test_without_details_the_scores_are_the_same():
    splits = make_splits(noise=1.0)
    subsets = {"cats": select_subset(splits, split="cats")}
    evaluator = FactEvaluator(splits.facts, distance="euclidean", track=["cats"], subsets=subsets, batch_size=4)
    full = evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)
    short = evaluator.without_details().evaluate(nn.Identity(), splits, BEFORE_FIRST)
    assert (short.scores, short.pooled, short.details.tracked) == (full.scores, full.pooled, {})


def test_labels_outside_the_table_and_tracked_facts_without_images_are_refused():
    splits = make_splits()
    first_three = FactTable(*(value[:3] for value in vars(splits.facts).values()))
    message = "split 'others' has labels from 2 to 4, which must be rows of the table of 3 facts"
    with pytest.raises(UserError, match=message):
        FactEvaluator(first_three).check(splits)
    subsets = {"cats": select_subset(splits, split="cats")}
    dogs_only = Part(splits[0].gallery.inputs[3:], splits[0].gallery.labels[3:])
    splits[0] = Split("cats", splits[0].train, dogs_only, dogs_only)
    evaluator = FactEvaluator(splits.facts, track=["cats"], subsets=subsets)
    for refuses in (evaluator.check, lambda splits: evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)):
        with pytest.raises(UserError, match="'cats' cannot be tracked: no held-out image shows <cat>"):
            refuses(splits)


def test_an_empty_gallery_is_refused():
    splits = make_splits()
    nothing = Part(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    splits.append(Split("none", splits[0].train, splits[0].query, nothing))
    with pytest.raises(UserError, match="split 'none' has an empty gallery part"):
        FactEvaluator(splits.facts).check(splits)


def test_options_that_cannot_be_used_are_refused():
    splits = make_splits()
    subsets = {"cats": select_subset(splits, split="cats")}
    with pytest.raises(UserError, match="unknown subset 'cat': did you mean 'cats'"):
        FactEvaluator(splits.facts, track=["cat"], subsets=subsets)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        FactEvaluator(splits.facts, batch_size=0)


def train(splits, *, epochs=5, lr=None, distance="cosine", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    facts, subsets = splits.facts, {"cats": select_subset(splits, split="cats")}
    optimizer = {} if lr is None else {"optimizer": partial(torch.optim.Adam, lr=lr)}
    return train_sequence(
        model,
        splits,
        method=Finetune(model),
        loss=FactLoss(facts.vectors, facts.weights),
        recipe=Recipe(epochs=epochs, batch_size=4, **optimizer),
        evaluator=FactEvaluator(facts, distance=distance, track=["cats"], subsets=subsets),
        **options,
    )


def tracked_in(result):
    return [details["tracked"] for details in result.details]


def test_a_sequence_of_facts_is_learned_and_tracked():
    result = train(make_splits(noise=0.1, per_fact=12), epochs=20, lr=0.03)
    matrix = result.scores["mean_average_precision"]
    assert matrix.scores.shape == (2, 2)
    assert matrix.learning > 0.85 > np.mean(result.initial["mean_average_precision"])
    assert tracked_in(result) == [{"cats": value} for value in matrix.scores[:, 0].tolist()]  # it is the first split


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    splits, checkpoint = make_splits(noise=0.5), tmp_path / "c.safetensors"
    expected = train(splits)
    with pytest.raises(Stopped):
        train(splits, checkpoint=checkpoint, callbacks=[Recorder(lambda event: isinstance(event, SplitEnd))])
    with pytest.raises(UserError, match="an evaluator with distance cosine, but this one has euclidean"):
        train(splits, checkpoint=checkpoint, resume=True, distance="euclidean")
    resumed = train(splits, checkpoint=checkpoint, resume=True)
    assert tracked_in(resumed) == tracked_in(expected)
    assert resumed.pooled == expected.pooled
    for name, matrix in expected.scores.items():
        np.testing.assert_array_equal(matrix.scores, resumed.scores[name].scores)


def test_facts_are_recorded_with_their_nearest_images():
    splits = make_splits(noise=1.0)
    evaluator = FactEvaluator(splits.facts)
    evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)
    assert evaluator.observations() is None
    first = evaluator.evaluate(nn.Identity(), splits, 0)
    last = evaluator.evaluate(nn.Identity(), splits, 1)
    queries = evaluator.observations().queries
    assert (queries.kind, queries.neighbour_kind) == ("label", "item")
    assert queries.label.tolist() == [0, 1, 2, 3, 4] and queries.split.tolist() == [0, 0, 1, 1, 1]
    assert (queries.index == -1).all()
    images, labels = gallery_of(splits)
    where = [(split, index) for split, one in enumerate(splits) for index in range(len(one.gallery))]
    scores = evaluate_fact_retrieval(images, labels, splits.facts.vectors, splits.facts.weights)
    for q, fact in enumerate(queries.label.tolist()):
        slots = [slot for slot in range(3) if WORDS[fact][slot]]
        target = splits.facts.targets[fact]
        distances = [sum(float(image[slot] - target[slot]) ** 2 for slot in slots) for image in images]
        nearest = sorted(range(len(images)), key=lambda i, distances=distances: distances[i])[:5]
        found = list(zip(queries.now.split[q].tolist(), queries.now.index[q].tolist(), strict=True))
        assert found == [where[i] for i in nearest]
        assert queries.now.label[q].tolist() == [int(labels[i]) for i in nearest]
        assert queries.now.similarity[q].tolist() == pytest.approx([-distances[i] for i in nearest], abs=1e-5)
        assert queries.score_now[q] == pytest.approx(scores.average_precision[fact], abs=1e-6)
    recorded = evaluator.observations()
    assert recorded.classes.now.tolist() == queries.score_now.tolist()
    assert len(recorded.map.split) == len(images)
    # Among the images of all splits; the scores themselves are those among the images of each
    means = [float(np.mean(scores.average_precision[rows])) for rows in SPLITS.values()]
    assert last.details.all_galleries["mean_average_precision"] == pytest.approx(means)
    assert first.details.all_galleries["mean_average_precision"] == pytest.approx(means[:1])
    assert FactEvaluator(splits.facts, recorded_queries=0).observations() is None


def test_what_is_recorded_of_facts_is_in_the_state():
    splits = make_splits(noise=1.0)
    evaluator, other = FactEvaluator(splits.facts), FactEvaluator(splits.facts)
    evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)
    evaluator.evaluate(nn.Identity(), splits, 0)
    other.load_state_dict(evaluator.state_dict())
    changed = nn.Linear(3, 3)
    for one in (evaluator, other):
        one.evaluate(changed, splits, 1)
    kept, restored = (one.observations().queries for one in (evaluator, other))
    np.testing.assert_array_equal(kept.learned.index, restored.learned.index)
    np.testing.assert_array_equal(kept.score_learned, restored.score_learned)
    assert (kept.score_learned[kept.split == 0] != kept.score_now[kept.split == 0]).any()
    with pytest.raises(UserError, match="recorded_queries must be a whole number >= 0"):
        FactEvaluator(splits.facts, recorded_queries=-1)
