import pytest
import torch
from torch import nn

from mas_embed import UserError, estimate_local_importance


def by_loops(layer, inputs):
    """Mean over samples of |sum over positions of input x relu(output)|, for a linear layer on [N, T, I]."""
    total = torch.zeros_like(layer.weight)
    bias = torch.zeros_like(layer.bias)
    for sample in inputs:
        product, summed = torch.zeros_like(total), torch.zeros_like(bias)
        for position in sample:
            output = layer(position).clamp_min(0)
            product += torch.outer(output, position)
            summed += output
        total += product.abs() / len(inputs)
        bias += summed.abs() / len(inputs)
    return {"weight": total, "bias": bias}


def test_two_samples_by_hand():
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    # (1, 1): y = (3, -1) -> (3, 0); (2, 0): y = (2, -2) -> (2, 0): first row (3*1 + 2*2, 3*1 + 0) / 2
    importance = estimate_local_importance(layer, [torch.tensor([[1.0, 1.0], [2.0, 0.0]]).double()])
    assert importance["weight"].tolist() == [[3.5, 1.5], [0.0, 0.0]]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_linear_layer_over_positions_equals_the_loops(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).double()
    inputs = torch.randn(7, 5, 3, dtype=torch.float64)
    importance = estimate_local_importance(model, inputs.split(batch_size))
    with torch.no_grad():
        expected = {f"0.{name}": value for name, value in by_loops(model[0], inputs).items()}
        hidden = model[:3](inputs).unsqueeze(1)
        expected |= {f"3.{name}": value for name, value in by_loops(model[3], hidden).items()}
    assert importance.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(importance[name], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv1d(2, 3, 2, stride=2), nn.ConvTranspose2d(2, 3, 2, stride=2)],
)
def test_is_half_the_gradient_of_the_layers_own_squared_output(layer):
    torch.manual_seed(0)
    layer = layer.double()
    inputs = torch.randn(5, 2, *([6] * (layer.weight.ndim - 2)), dtype=torch.float64)
    importance = estimate_local_importance(layer, inputs.split(2), embed=lambda model, batch: model(batch).flatten(1))
    expected = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for sample in inputs.split(1):
        gradients = torch.autograd.grad(layer(sample).relu().square().sum(), list(layer.parameters()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.abs() / 2 / len(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(importance[name], value, rtol=1e-10, atol=1e-13)


def test_the_model_is_unchanged_and_has_no_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(), nn.Linear(4, 2))
    importance = estimate_local_importance(model, [torch.randn(4, 3)])
    assert set(importance) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert importance.settings["output"] == "local"


def test_models_without_local_importance_are_refused():
    with pytest.raises(UserError, match="no trainable linear layer or convolution"):
        estimate_local_importance(nn.LayerNorm(3), [torch.randn(4, 3)])
    with pytest.raises(UserError, match="has 20 rows for 4 samples"):
        model = nn.Linear(3, 2)
        estimate_local_importance(model, [torch.randn(4, 5, 3)], embed=lambda m, x: m(x.flatten(0, 1)).view(4, -1))
    with pytest.raises(UserError, match="batches is empty"):
        estimate_local_importance(nn.Linear(3, 2), [])


def test_later_in_place_operations_do_not_change_it():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Hardswish(), nn.Linear(4, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    expected = estimate_local_importance(plain, [inputs])
    plain[1].inplace = True
    importance = estimate_local_importance(plain, [inputs])
    assert all(torch.equal(importance[name], expected[name]) for name in expected)
