"""The oracles themselves, pinned by numbers computed by hand."""

import pytest
import torch
from oracles import average_precision, cut_measures, per_sample_importance, squared_norm


def test_importance_of_two_samples_by_hand():
    # F(x) = 3 x1 + 1 x2; gradient of F^2 is 2 F x: (1, 0) -> F 3, (6, 0); (0, 1) -> F 1, (0, 2)
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    samples = [torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()]
    assert per_sample_importance(model, samples, squared_norm(model))["weight"].tolist() == [[3.0, 1.0]]
    assert per_sample_importance(model, samples, squared_norm(model), exponent=2)["weight"].tolist() == [[18.0, 2.0]]


def test_average_precision_by_hand():
    # ranks: relevant 1/1, then a tie of one relevant and one irrelevant: 2 of 3
    assert average_precision([3, 2, 2], [True, True, False]) == pytest.approx((1 + 2 / 3) / 2)


def test_cut_measures_by_hand():
    measures = cut_measures([3, 2, 2, 1], [False, True, False, True], ks=(1, 2, 3))
    # in order: irrelevant; irrelevant and relevant of score 2, the irrelevant one first; relevant
    assert measures == {
        "precision_at_1": 0.0,
        "r_precision": 0.0,
        "average_precision_at_r": 0.0,
        "reciprocal_rank": 1 / 3,
        "recall_at_1": 0.0,
        "recall_at_2": 0.0,
        "recall_at_3": 1.0,
    }
