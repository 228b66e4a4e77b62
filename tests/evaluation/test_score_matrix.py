import math

import numpy as np
import pytest

from mas_embed import ScoreMatrix, UserError

THREE = [[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.5, 0.7, 0.6]]


def test_three_splits_by_hand():
    scores = ScoreMatrix(THREE)
    assert scores.final_average == pytest.approx((0.5 + 0.7 + 0.6) / 3)
    assert scores.learning == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    # The best of split 0 came after split 1: 0.95
    assert scores.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert scores.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert scores.forward_transfer([0.1, 0.15, 0.05]) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.05)) / 2)
    assert scores.intransigence([1.0, 0.9, 0.9]) == pytest.approx((0.1 + 0.1 + 0.3) / 3)


def test_two_splits_by_hand():
    scores = ScoreMatrix([[0.9, 0.3], [0.6, 0.8]])
    assert scores.forgetting == pytest.approx(0.3)
    assert scores.backward_transfer == pytest.approx(-0.3)
    assert scores.forward_transfer([0.0, 0.1]) == pytest.approx(0.2)


def test_forgetting_is_negative_where_later_splits_help():
    assert ScoreMatrix([[0.5, 0.0], [0.7, 0.8]]).forgetting == pytest.approx(-0.2)


def test_one_split_has_nothing_to_forget():
    scores = ScoreMatrix([[0.9]])
    assert scores.final_average == scores.learning == 0.9
    assert math.isnan(scores.forgetting)
    assert math.isnan(scores.backward_transfer)
    assert math.isnan(scores.forward_transfer([0.1]))


def test_joint_training_has_a_final_average_only():
    scores = ScoreMatrix([[0.9, 0.7]])
    assert scores.final_average == pytest.approx(0.8)
    assert all(
        map(math.isnan, (scores.learning, scores.forgetting, scores.backward_transfer, scores.intransigence([1, 1])))
    )


def test_is_indexed_by_training_and_split_and_does_not_alias():
    values = np.array(THREE)
    scores = ScoreMatrix(values)
    values[:] = 0
    assert scores[1, 0] == 0.95
    assert "0.95" in repr(scores)


@pytest.mark.parametrize("scores", [[0.1, 0.2], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [[]], np.zeros((2, 2, 2))])
def test_other_shapes_are_refused(scores):
    with pytest.raises(UserError, match=r"shape \[S, S\]"):
        ScoreMatrix(scores)


def test_infinite_scores_are_refused():
    with pytest.raises(UserError, match="finite"):
        ScoreMatrix([[float("inf")]])


def test_measures_use_the_scores_that_were_measured_and_say_how_many():
    nan = math.nan
    scores = ScoreMatrix([[0.9, nan, nan, nan], [nan, nan, nan, nan], [0.7, 0.6, 0.8, nan], [0.5, 0.4, 0.9, nan]])
    assert scores.final_average == pytest.approx((0.5 + 0.4 + 0.9) / 3)
    assert scores.learning == pytest.approx((0.9 + 0.8) / 2)
    assert scores.forgetting == pytest.approx(((0.9 - 0.5) + (0.6 - 0.4) + (0.8 - 0.9)) / 3)
    assert scores.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert scores.num_averaged == {"final_average": 3, "forgetting": 3, "backward_transfer": 2, "learning": 2}
    assert scores.intransigence([1, 1, 1, 1]) == pytest.approx((0.1 + 0.2) / 2)


def test_where_nothing_was_measured_a_measure_is_nan():
    scores = ScoreMatrix([[0.9, math.nan], [math.nan, 0.8]])
    assert math.isnan(scores.forgetting) and math.isnan(scores.backward_transfer)
    assert math.isnan(scores.forward_transfer([math.nan, 0.1]))
    assert scores.num_averaged == {"final_average": 1, "forgetting": 0, "backward_transfer": 0, "learning": 2}
    assert ScoreMatrix([[0.9, 0.7]]).num_averaged == {
        "final_average": 2, "forgetting": 0, "backward_transfer": 0, "learning": 0,
    }  # fmt: skip


def test_reference_scores_of_a_wrong_length_are_refused():
    with pytest.raises(UserError, match=r"initial must have one score per split, shape \[3\], got \[2\]"):
        ScoreMatrix(THREE).forward_transfer([0.1, 0.2])
