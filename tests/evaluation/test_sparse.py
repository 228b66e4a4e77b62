"""Fewer evaluations: what is measured equals the full run, and what is not is NaN."""

import math
from functools import partial

import numpy as np
import pytest
from small import Recorder, Stopped, small_splits, train

from mas_embed import Finetune, Frozen, RetrievalEvaluator, SparseEvaluator, UserError, join_splits

METRIC = "mean_average_precision"


def scores_with(splits=5, **options):
    evaluator = SparseEvaluator(RetrievalEvaluator(recall_at=(1,)), **options)
    _, result = train(splits=small_splits(splits), epochs=1, evaluator=evaluator)
    return result


def test_every_second_split_and_the_last_are_evaluated():
    _, full = train(splits=small_splits(5), epochs=1)
    sparse = scores_with(every=2)
    expected = full.scores[METRIC].scores.copy()
    expected[[0, 2]] = math.nan
    np.testing.assert_array_equal(sparse.scores[METRIC].scores, expected)
    assert sparse.scores[METRIC].num_averaged == {
        "final_average": 5, "forgetting": 4, "backward_transfer": 2, "learning": 3,
    }  # fmt: skip
    assert sparse.initial == full.initial
    assert sparse.pooled == full.pooled
    assert [bool(details) for details in sparse.details] == [False, True, False, True, True]


def test_an_index_is_compared_across_the_splits_since_the_last_evaluation():
    sparse = scores_with(every=2)
    updates = [details.get("index_update") for details in sparse.details]
    assert [update["after"] if update else None for update in updates] == [None, None, None, "s2", "s4"]


def test_only_learned_splits_are_evaluated_against_their_galleries():
    result = scores_with(splits=3, only_learned=True)
    is_measured = ~np.isnan(result.scores[METRIC].scores)
    np.testing.assert_array_equal(is_measured, np.tri(3, dtype=bool))
    _, first = train(splits=small_splits(3)[:1], epochs=1, evaluator=RetrievalEvaluator(recall_at=(1,)))
    # The model after the first split of three is that after the only one of one
    assert result.scores[METRIC][0, 0] == first.scores[METRIC][0, 0]
    assert result.scores[METRIC].num_averaged["forgetting"] == 2


def test_weights_that_do_not_change_embed_every_learned_split_once():
    num_embedded = []

    class Counting(RetrievalEvaluator):
        def _embed(self, model, part):
            num_embedded.append(len(part))
            return super()._embed(model, part)

    splits = small_splits(3)
    evaluator = SparseEvaluator(Counting(follow_index=False), only_learned=True)
    _, result = train(Frozen, splits=splits, epochs=1, evaluator=evaluator)
    size = len(splits[0].gallery)
    assert num_embedded == [size] * 3 + [size] * 3  # before training all three, then each when it is reached
    assert result.scores[METRIC][0, 0] >= result.scores[METRIC][2, 0]  # the gallery has grown


def test_joint_training_is_evaluated_on_all_splits():
    splits = small_splits()
    evaluator = SparseEvaluator(RetrievalEvaluator(), every=2, only_learned=True)
    _, result = train(splits=[join_splits(splits)], evaluate_on=splits, evaluator=evaluator)
    assert not np.isnan(result.scores[METRIC].scores).any()


def test_resume_between_two_evaluations_is_uninterrupted(tmp_path):
    make = partial(train, Finetune, splits=None, epochs=1)
    evaluator = partial(SparseEvaluator, RetrievalEvaluator(recall_at=(1,)), every=3)
    _, expected = make(evaluator=evaluator())
    for stop_after in (0, 1):
        checkpoint = tmp_path / f"c{stop_after}.safetensors"
        stopper = Recorder(
            lambda event, stop_after=stop_after: getattr(event, "evaluation", None) and event.split_index == stop_after
        )
        with pytest.raises(Stopped):
            make(evaluator=evaluator(), checkpoint=checkpoint, callbacks=[stopper])
        _, resumed = make(evaluator=evaluator(), checkpoint=checkpoint, resume=True)
        assert resumed.details == expected.details
        np.testing.assert_array_equal(resumed.scores[METRIC].scores, expected.scores[METRIC].scores)


def test_resume_between_a_split_that_was_passed_over_and_the_next_evaluation(tmp_path):
    """The vectors of the weights before the split that was passed over are in the checkpoint."""
    make = partial(train, Finetune, epochs=1)

    def evaluator():
        return SparseEvaluator(RetrievalEvaluator(recall_at=(1,)), every=2)

    _, expected = make(splits=small_splits(4), evaluator=evaluator())
    checkpoint = tmp_path / "c.safetensors"
    stopper = Recorder(lambda event: hasattr(event, "evaluation") and event.split_index == 2)
    with pytest.raises(Stopped):
        make(splits=small_splits(4), evaluator=evaluator(), checkpoint=checkpoint, callbacks=[stopper])
    _, resumed = make(splits=small_splits(4), evaluator=evaluator(), checkpoint=checkpoint, resume=True)
    assert resumed.details == expected.details


def test_a_query_that_only_a_later_gallery_can_answer_is_refused_where_only_learned_splits_are_searched():
    first, second, _ = small_splits()
    moved = type(first)(first.name, first.train, query=first.query, gallery=second.gallery)
    other = type(first)(second.name, second.train, query=second.query, gallery=first.gallery)
    SparseEvaluator(RetrievalEvaluator()).check([moved, other])
    with pytest.raises(UserError, match="split 's0' has queries of class 0, but no gallery"):
        SparseEvaluator(RetrievalEvaluator(), only_learned=True).check([moved, other])


def test_every_must_be_positive():
    with pytest.raises(UserError, match="every must be a whole number >= 1, got 0"):
        SparseEvaluator(RetrievalEvaluator(), every=0)
