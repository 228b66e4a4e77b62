"""The scores of each split with its own gallery only, beside those with the galleries of all splits."""

import json
import math

import numpy as np
import pytest
import torch
from small import small_model, small_splits, train

from mas_embed import Part, RetrievalEvaluator, Split, evaluate_retrieval
from mas_embed.evaluation import RunRecord
from mas_embed.evaluation import own_gallery as own_gallery_module
from mas_embed.evaluation.own_gallery import OWN_GALLERY_METRICS, scores_of_own_galleries


def embedded(splits, part):
    model = small_model().eval()
    with torch.no_grad():
        return [model(getattr(split, part).inputs) for split in splits]


@pytest.mark.parametrize("most_pairs", [2**20, 0])  # all at once, and one after another
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_split_is_ranked_alone(monkeypatch, most_pairs, distance):
    monkeypatch.setattr(own_gallery_module, "MOST_PAIRS", most_pairs)
    splits = small_splits(3, per_class=5)
    queries = galleries = embedded(splits, "query")
    found = scores_of_own_galleries(splits, queries, galleries, distance=distance)
    assert tuple(found) == OWN_GALLERY_METRICS
    for index, split in enumerate(splits):
        rows, labels = queries[index], split.query.labels
        expected = evaluate_retrieval(rows, labels, distance=distance, recall_at=(1,)).as_dict()
        for metric, values in found.items():
            assert values[index] == pytest.approx(expected[metric], rel=1e-12)


@pytest.mark.parametrize("most_pairs", [2**20, 0])
def test_a_split_whose_queries_find_nothing_of_their_class_in_it_is_not_scored(monkeypatch, most_pairs):
    monkeypatch.setattr(own_gallery_module, "MOST_PAIRS", most_pairs)
    first, second, _ = small_splits()
    lonely = Part(first.query.inputs[:1], torch.tensor([2]), torch.tensor([77]))  # class 2 is in the second split
    itself = Split("itself", first.train, lonely, lonely)
    splits = [Split("s0", first.train, lonely, first.gallery), second, itself]
    found = scores_of_own_galleries(splits, embedded(splits, "query"), embedded(splits, "gallery"), distance="cosine")
    assert [math.isnan(value) for value in found["mean_average_precision"]] == [True, False, True]


def test_after_every_split_those_learned_so_far_are_scored():
    _, result = train()
    rows = [details["own_gallery"]["mean_average_precision"] for details in result.details]
    assert [len(row) for row in rows] == [1, 2, 3]
    record = RunRecord.model_validate(json.loads(result.as_record().model_dump_json()))
    both = record.own_and_all("mean_average_precision")
    np.testing.assert_array_equal(np.isnan(both.own.scores), np.triu(np.ones((3, 3)), 1) == 1)
    np.testing.assert_array_equal(both.all.scores, result.scores["mean_average_precision"].scores)
    lower = np.tril_indices(3)
    assert (both.own.scores[lower] >= both.all.scores[lower] - 1e-12).all()  # fewer items to be confused with
    assert both.own.forgetting == pytest.approx(
        np.mean([max(row[j] for row in rows[j:2]) - rows[2][j] for j in range(2)])
    )
    assert record.own_and_all("r_precision") is None
    assert record.own_and_all("none") is None


def test_scores_do_not_depend_on_what_is_recorded():
    whole, alone = (
        train(evaluator=RetrievalEvaluator(recall_at=(1,), **options))[1]
        for options in ({}, {"own_galleries": False, "recorded_queries": 0})
    )
    for metric, matrix in whole.scores.items():
        np.testing.assert_array_equal(matrix.scores, alone.scores[metric].scores)
    assert all("own_gallery" not in details or details["own_gallery"] is None for details in alone.details)
