import copy

import pytest
import torch
from torch import nn

from mas_embed import MAS, SI, UserError


def line(**options):
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(1.0)
    return model, SI(model, **options), torch.optim.SGD(model.parameters(), lr=0.1)


def step(model, si, optimizer, gradient):
    model.weight.grad = torch.full_like(model.weight, gradient)
    si.add_penalty_grad()
    optimizer.step()
    si.after_step(optimizer)


def test_importance_by_hand():
    model, si, optimizer = line()
    step(model, si, optimizer, 2.0)  # moves by -0.2: w = 0.4
    step(model, si, optimizer, -1.0)  # moves by +0.1: w = 0.5
    importance = si.consolidate([])
    assert importance["weight"].item() == pytest.approx(0.5 / (0.1**2 + 1e-3))
    assert si.anchor["weight"].item() == pytest.approx(0.9)
    assert si.path == si.start == {}


def test_the_gradient_is_that_of_the_loss_without_the_pull():
    model, si, optimizer = line(strength=0.01)
    step(model, si, optimizer, 2.0)
    si.consolidate([])
    importance = si.importance["weight"].item()  # 0.4 / (0.04 + 0.001), at the anchor 0.8
    model.weight.data.fill_(1.8)
    step(model, si, optimizer, 3.0)
    movement = -0.1 * (3.0 + 2 * 0.01 * importance * 1.0)
    assert model.weight.item() == pytest.approx(1.8 + movement)
    assert si.path["weight"].item() == pytest.approx(-3.0 * movement)


def test_a_path_that_went_uphill_has_no_importance():
    model, si, optimizer = line()
    step(model, si, optimizer, 2.0)
    model.weight.grad = torch.full_like(model.weight, 5.0)
    si.add_penalty_grad()
    model.weight.data.add_(1.0)
    si.after_step(optimizer)
    assert si.path["weight"].item() == pytest.approx(0.4 - 5.0)
    assert si.consolidate([])["weight"].item() == 0


@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.1),
])  # fmt: skip
def test_against_a_loop_over_recorded_steps(make_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, si = torch.randn(6, 3).double(), SI(model, xi=0.1)
    optimizer = make_optimizer(model.parameters())
    start, visited, gradients = copy.deepcopy(model.state_dict()), [], []
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        visited.append(copy.deepcopy(model.state_dict()))
        si.add_penalty_grad()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        si.after_step(optimizer)
    end = copy.deepcopy(model.state_dict())
    visited.append(end)
    importance = si.consolidate([inputs])
    for name in end:
        path = torch.zeros_like(end[name])
        for index, gradient in enumerate(gradients):
            path -= gradient[name] * (visited[index + 1][name] - visited[index][name])
        expected = path.clamp(min=0) / ((end[name] - start[name]) ** 2 + 0.1)
        torch.testing.assert_close(importance[name], expected, rtol=1e-10, atol=1e-14)


def test_a_decoupled_pull_is_part_of_the_path():
    model, si, optimizer = line(decoupled=True)
    step(model, si, optimizer, 2.0)
    si.consolidate([])
    before = model.weight.item()
    step(model, si, optimizer, 3.0)
    assert si.path["weight"].item() == pytest.approx(-3.0 * (model.weight.item() - before))
    assert abs(model.weight.item() - 0.8) < 0.3  # SGD alone would have moved it by 0.3


def test_a_state_in_the_middle_of_a_split_resumes_bit_for_bit():
    model, si, optimizer = line()
    step(model, si, optimizer, 2.0)
    state, weights = copy.deepcopy(si.state_dict()), copy.deepcopy(model.state_dict())
    resumed_model, resumed, resumed_optimizer = line()
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for arguments in ((model, si, optimizer), (resumed_model, resumed, resumed_optimizer)):
        step(*arguments, 0.7)
    assert torch.equal(si.consolidate([])["weight"], resumed.consolidate([])["weight"])


def test_a_loop_that_never_calls_after_step_is_refused_at_its_second_step():
    model, si, optimizer = line()
    state, weights = copy.deepcopy(si.state_dict()), copy.deepcopy(model.state_dict())
    model.weight.grad = torch.ones_like(model.weight)
    si.add_penalty_grad()
    si.add_penalty_grad()  # a gradient scaler has skipped the step
    optimizer.step()
    with pytest.raises(
        UserError, match=r"SI has not recorded the last step, .*; call after_step\(optimizer\) after every"
    ):
        si.add_penalty_grad()
    model.load_state_dict(weights)
    si.load_state_dict(state)  # starts again after a mistake
    step(model, si, optimizer, 2.0)


def test_a_split_without_steps_and_a_wrong_xi():
    model, si, _ = line()
    with pytest.raises(
        UserError, match=r"SI has recorded no step of this split; call add_penalty_grad\(\) before and after_step"
    ):
        si.consolidate([])
    with pytest.raises(UserError, match="xi must be greater than 0, got 0"):
        SI(model, xi=0)
    with pytest.raises(UserError, match="lacks path, start; it is not a state of SI"):
        si.load_state_dict(MAS(model).state_dict())
