"""Distillation of the old heads, by loops and by hand."""

import copy
import math
from functools import partial

import pytest
import torch
from small_recognition import CLASSES, small_net
from torch import nn

from mas_embed import UserError
from mas_embed.recognition import MultiHeadLwF
from mas_embed.testing import check_method


def moved(num_splits=2, **options):
    """A method after some splits, its model with other weights than then, the old model, and a batch."""
    model = small_net().double()
    method = MultiHeadLwF(model, CLASSES, **options)
    for _ in range(num_splits):
        method.consolidate([])
    old = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    return model, method, old, torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()


def by_loops(new, old, heads, temperature):
    total = 0.0
    for new_row, old_row in zip(new.tolist(), old.tolist(), strict=True):
        for head in heads:
            p, q = ([math.exp(row[c] / temperature) for c in head] for row in (old_row, new_row))
            total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True))
    return total / len(new)


@pytest.mark.parametrize(("num_splits", "heads"), [(1, [[0, 1]]), (2, [[0, 1], [2, 3, 4]])])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_loops(num_splits, heads, temperature):
    model, method, old, inputs = moved(num_splits, strength=3.0, temperature=temperature)
    expected = 3 * by_loops(model(inputs), old(inputs), heads, temperature)
    assert method.batch_penalty(inputs, model(inputs)).item() == pytest.approx(expected, rel=1e-10)


def test_by_hand():
    model = nn.Linear(1, 2, bias=False)  # one head of two classes
    model.weight.data.zero_()
    method = MultiHeadLwF(model, [2], temperature=1.0)
    method.consolidate([])
    model.weight.data.copy_(torch.tensor([[0.0], [math.log(3)]]))
    # the old model gives 1/2 and 1/2, the new one 1/4 and 3/4
    value = method.batch_penalty(torch.ones(1, 1), model(torch.ones(1, 1)))
    assert value.item() == pytest.approx(-(math.log(1 / 4) + math.log(3 / 4)) / 2)


def test_the_new_head_is_free_and_the_old_model_fixed():
    model, method, old, inputs = moved()
    method.batch_penalty(inputs, model(inputs)).backward()
    assert not any(parameter.grad.any() for parameter in model.head[2].parameters())
    assert all(parameter.grad.any() for head in model.head[:2] for parameter in head.parameters())
    same = MultiHeadLwF(old, CLASSES)
    same.consolidate([])
    parameters = list(old.parameters())
    penalty = same.batch_penalty(inputs, old(inputs))
    for gradient in torch.autograd.grad(penalty, parameters, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-12  # least where nothing has changed


def test_nothing_is_added_before_the_first_split_or_at_strength_zero():
    model, method, _, inputs = moved(0)
    assert method.batch_penalty(inputs, model(inputs)) is None
    model, method, _, inputs = moved(strength=0.0)
    assert method.batch_penalty(inputs, model(inputs)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be greater than 0, got 0"),
        ({"strength": -1}, "strength must be a finite number"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        MultiHeadLwF(small_net(), CLASSES, **options)


def test_scores_of_another_size_are_refused():
    _, method, _, inputs = moved()
    with pytest.raises(UserError, match=r"7 classes, so class scores must have shape \[N, 7\], got \[6, 2\]"):
        method.batch_penalty(inputs, torch.zeros(6, 2))


def test_the_contract():
    check_method(partial(MultiHeadLwF, classes_per_split=[2]))
