import copy

import pytest
import torch
from torch import nn

from mas_embed import MAS, UserError, estimate_importance


def hand_made(**options):
    """Weights (1, 2) anchored, importance (3, 5), then moved to (1.5, 1)."""
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    mas = MAS(model, strength=10.0, **options)
    mas.load_state_dict(
        {
            "importance": {"weight": torch.tensor([[3.0, 5.0]], dtype=torch.float64)},
            "anchor": {"weight": torch.tensor([[1.0, 2.0]], dtype=torch.float64)},
            "num_splits": 1,
        }
    )
    model.weight.data.copy_(torch.tensor([[1.5, 1.0]]))
    return model, mas


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype), torch.randn(8, 4, dtype=dtype)


def consolidated(strength=2.0, **options):
    model, inputs = network()
    mas = MAS(model, strength=strength, **options)
    mas.consolidate([inputs])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, mas, inputs


def test_penalty_by_hand():
    model, mas = hand_made()
    # 10 (3 * 0.5^2 + 5 * (-1)^2) = 57.5; gradient 2 * 10 * (3 * 0.5, 5 * -1)
    assert mas.penalty().item() == pytest.approx(57.5)
    mas.penalty().backward()
    assert model.weight.grad.tolist() == [[30.0, -100.0]]


def test_gradient_form_by_hand_adds_to_the_gradient():
    model, mas = hand_made()
    mas.add_penalty_grad()
    assert model.weight.grad.tolist() == [[30.0, -100.0]]
    model.weight.grad = torch.ones(1, 2, dtype=torch.float64)
    mas.add_penalty_grad()
    assert model.weight.grad.tolist() == [[31.0, -99.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_form_equals_autograd_of_the_loss_form(dtype):
    model, mas, _ = consolidated()
    model.to(dtype)
    mas.penalty().backward()
    by_loss = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    mas.add_penalty_grad()
    for parameter, expected in zip(model.parameters(), by_loss, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_penalty_is_exactly_zero_before_the_first_split_and_at_the_anchor():
    model, inputs = network()
    mas = MAS(model)
    assert mas.penalty().item() == 0
    mas.add_penalty_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = model(inputs).sum() + mas.penalty()
    loss.backward()
    mas.consolidate([inputs])
    assert mas.penalty().item() == 0


def test_strength_zero_leaves_no_gradient():
    model, mas, _ = consolidated(strength=0.0)
    mas.add_penalty_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert mas.penalty().item() == 0


def test_consolidate_returns_the_importance_of_the_split_and_moves_the_anchor():
    model, mas, inputs = consolidated()
    estimated = mas.consolidate([inputs])
    expected = estimate_importance(model, [inputs])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(estimated[name], expected[name])
        assert torch.equal(mas.anchor[name], parameter)
    assert mas.num_splits == 2


@pytest.mark.parametrize(
    ("accumulation", "expected"),
    [
        ("sum", [[1.0, 2.0], [5.0, 5.0], [6.0, 11.0]]),
        ("mean", [[1, 2], [2.5, 2.5], [2, 11 / 3]]),
        ("decay", [[1, 2], [4.5, 4], [3.25, 8]]),
        ("max", [[1, 2], [4, 3], [4, 6]]),
    ],
)
def test_accumulation_by_hand(monkeypatch, accumulation, expected):
    model = nn.Linear(2, 1, bias=False)
    mas = MAS(model, accumulation=accumulation, decay=0.5)
    estimates = iter([[[1.0, 2.0]], [[4.0, 3.0]], [[1.0, 6.0]]])
    monkeypatch.setattr(mas, "estimate", lambda batches: {"weight": torch.tensor(next(estimates))})
    for values in expected:
        mas.consolidate([])
        assert mas.importance["weight"][0].tolist() == pytest.approx(values)


def test_normalized_importance_by_hand():
    """Importance 3 and 5 has the mean 4, so the penalty of `test_penalty_by_hand` is a quarter."""
    model, mas = hand_made(normalize=True)
    assert mas.penalty().item() == pytest.approx(57.5 / 4)
    mas.add_penalty_grad()
    assert model.weight.grad.tolist() == [[7.5, -25.0]]
    assert mas.importance["weight"].tolist() == [[3.0, 5.0]]


def test_one_strength_fits_any_scale_of_the_output_and_any_number_of_splits():
    model, inputs = network()
    penalties = []
    for scale, num_splits in ((1, 1), (1, 4), (100, 1)):
        mas = MAS(
            model, normalize=True, output=lambda embeddings, batch, scale=scale: scale * embeddings.square().sum(1)
        )
        for _ in range(num_splits):
            mas.consolidate([inputs])
        moved = copy.deepcopy(model)
        mas.model = moved
        with torch.no_grad():
            moved[0].weight.add_(0.1)
        penalties.append(mas.penalty().item())
    assert penalties == pytest.approx([penalties[0]] * 3, rel=1e-10)


def test_importance_that_is_zero_everywhere_is_not_normalized():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    mas = MAS(model, normalize=True)
    model[0].weight.data.fill_(-1.0)
    mas.consolidate([torch.ones(2, 2)])
    assert mas.penalty().item() == 0


def test_the_decoupled_step_by_hand():
    """c = 2 * 0.1 * 10 * (3, 5) = (6, 10), from (1.5, 1) to the anchor (1, 2); the gradient stays as it was."""
    model, mas = hand_made(decoupled=True)
    mas.add_penalty_grad()
    assert model.weight.grad is None
    mas.after_step(torch.optim.SGD([{"params": [model.weight], "lr": 0.1}]))
    assert model.weight[0].tolist() == pytest.approx([(1.5 + 6 * 1) / 7, (1 + 10 * 2) / 11])


def test_the_decoupled_step_minimises_the_penalty_and_the_distance():
    model, mas, _ = consolidated(decoupled=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mas.after_step(torch.optim.Adam(model.parameters(), lr=0.3))
    distance = sum((p - before[name]).square().sum() for name, p in model.named_parameters())
    (mas.penalty() + distance / (2 * 0.3)).backward()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-12, rtol=0)


def test_the_decoupled_step_is_stable_at_any_strength_and_moves_only_parameters_of_the_optimizer():
    model, mas, _ = consolidated(strength=1e30, decoupled=True)
    untouched = model[2].weight.detach().clone()
    mas.after_step(torch.optim.SGD(model[0].parameters(), lr=0.1))
    torch.testing.assert_close(model[0].weight, mas.anchor["0.weight"])
    assert torch.equal(model[2].weight, untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_pulled(dtype):
    for decoupled in (False, True):
        model, mas = hand_made(decoupled=decoupled)
        model.to(dtype)
        mas.add_penalty_grad()
        mas.after_step(torch.optim.SGD(model.parameters(), lr=0.1))
        assert model.weight.dtype == dtype
        moved = model.weight.grad if not decoupled else model.weight
        assert moved[0].tolist() == pytest.approx([30, -100] if not decoupled else [7.5 / 7, 21 / 11], rel=1e-2)


def test_memory_is_importance_and_anchor():
    _, mas, _ = consolidated()
    assert mas.num_bytes == 2 * 8 * (4 * 6 + 6 + 6 * 3 + 3)


def test_a_parameter_added_later_is_free():
    model, mas, inputs = consolidated()
    before = mas.penalty().item()
    model.add_module("grown", nn.Linear(3, 2).double())
    nn.init.constant_(model.grown.weight, 100.0)
    assert mas.penalty().item() == before
    mas.add_penalty_grad()
    assert model.grown.weight.grad is None
    mas.consolidate([inputs])
    assert "grown.weight" in mas.importance


def test_a_parameter_frozen_later_is_not_pulled():
    model, mas, _ = consolidated()
    model[0].weight.requires_grad_(False)
    mas.add_penalty_grad()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_a_parameter_that_changed_its_shape_is_refused():
    model, mas, _ = consolidated()
    model[2] = nn.Linear(6, 5).double()
    for form in (mas.penalty, mas.add_penalty_grad):
        with pytest.raises(UserError, match=r"'2.(weight|bias)' has shape .*, but had .* when the last split ended"):
            form()


def test_gradient_accumulation_takes_the_penalty_once_per_step():
    model, mas, inputs = consolidated()
    model(inputs).sum().backward()
    mas.add_penalty_grad()
    in_one = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for micro_batch in inputs.split(2):
        model(micro_batch).sum().backward()
    mas.add_penalty_grad()
    for parameter, expected in zip(model.parameters(), in_one, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_the_penalty_is_not_scaled_by_a_gradient_scaler():
    model, mas, inputs = consolidated()
    model(inputs).sum().backward()
    mas.add_penalty_grad()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(inputs).sum()).backward()
    scaler.unscale_(optimizer)
    mas.add_penalty_grad()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_state_loads_into_a_fresh_method_and_resumes_bit_for_bit():
    model, mas, _ = consolidated()
    state = copy.deepcopy(mas.state_dict())
    twin = copy.deepcopy(model)
    resumed = MAS(twin, strength=2.0)
    resumed.load_state_dict(state)
    assert resumed.num_splits == 1
    for method, trained in ((mas, model), (resumed, twin)):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            method.add_penalty_grad()
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_state_of_another_model_is_refused():
    _, mas, _ = consolidated()
    other = MAS(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    with pytest.raises(UserError, match=r"'2.weight' has shape \[2, 6\] but \[3, 6\] in the state"):
        other.load_state_dict(mas.state_dict())
    with pytest.raises(UserError, match="'0.weight' that the model does not have"):
        MAS(nn.Linear(2, 2)).load_state_dict(mas.state_dict())


def test_state_does_not_alias_the_model():
    model, mas, _ = consolidated()
    anchor = mas.anchor["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(mas.anchor["0.weight"], anchor)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_out_of_range(strength):
    with pytest.raises(UserError, match="strength must be a finite number >= 0"):
        MAS(nn.Linear(2, 2), strength=strength)


def test_an_unknown_accumulation_or_output():
    with pytest.raises(UserError, match="accumulation must be 'sum', 'mean', 'decay' or 'max', got 'average'"):
        MAS(nn.Linear(2, 2), accumulation="average")
    with pytest.raises(UserError, match="unknown output 'norm'"):
        MAS(nn.Linear(2, 2), output="norm")


def test_nothing_is_left_on_the_model():
    model, inputs = network()
    before = [sorted(vars(module)) for module in model.modules()]
    mas = MAS(model)
    mas.consolidate([inputs])
    mas.add_penalty_grad()
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert model.training


def test_a_layer_that_is_frozen_for_a_split_stays_protected():
    model, mas, inputs = consolidated()
    importances = {name: value.clone() for name, value in mas.importance.items() if name.startswith("0.")}
    anchors = {name: value.clone() for name, value in mas.anchor.items() if name.startswith("0.")}
    model[0].requires_grad_(False)
    mas.consolidate([inputs])
    model[0].requires_grad_(True)
    for name, value in importances.items():
        assert torch.equal(mas.importance[name], value)
        assert torch.equal(mas.anchor[name], anchors[name])
    mas.add_penalty_grad()
    assert model[0].weight.grad.any()


def test_the_penalty_is_added_to_a_sparse_gradient():
    model = nn.EmbeddingBag(5, 3, sparse=True, mode="sum")
    mas = MAS(model)
    batch = torch.randint(5, (4, 2))
    mas.consolidate([batch])
    with torch.no_grad():
        model.weight.add_(1.0)
    model(batch).sum().backward()
    assert model.weight.grad.is_sparse
    mas.add_penalty_grad()
    assert model.weight.grad.any()


def test_an_incomplete_state_is_refused():
    with pytest.raises(UserError, match="lacks anchor, importance, num_splits; it is not a state of MAS"):
        MAS(nn.Linear(2, 2)).load_state_dict({})
