"""The importance equals its definition, computed with one autograd call per sample."""

import pytest
import torch
from importance_cases import CASES, assert_equal, make
from oracles import per_sample_importance, squared_norm
from torch import nn

from mas_embed import Importance, estimate_importance


def test_two_opposite_samples_by_hand():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    # Embeddings 3 and -1; gradients of the square 2 F x = (6, 6) and (-2, 2)
    inputs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert estimate_importance(model, [inputs])["weight"].tolist() == [[4.0, 4.0]]
    assert estimate_importance(model, [inputs], granularity="batch")["weight"].tolist() == [[2.0, 4.0]]
    assert estimate_importance(model, [inputs], granularity="batch", exponent=2)["weight"].tolist() == [[8.0, 32.0]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_equals_one_autograd_call_per_sample(name, batch_size):
    model, inputs = make(name)
    expected = per_sample_importance(model, inputs.split(1), squared_norm(model))
    assert any(value.any() for value in expected.values())
    assert_equal(estimate_importance(model, inputs.split(batch_size)), expected)


@pytest.mark.parametrize(
    "name", ["mlp", "conv groups", "batch norm", "class token", "called twice", "linear over positions"]
)
def test_squared_exponent(name):
    model, inputs = make(name)
    expected = per_sample_importance(model, inputs.split(1), squared_norm(model), exponent=2)
    assert_equal(estimate_importance(model, inputs.split(3), exponent=2), expected)


@pytest.mark.parametrize("name", ["mlp", "conv", "class token", "shared branch"])
def test_does_not_depend_on_order_or_merging(name):
    model, inputs = make(name)
    together = estimate_importance(model, [inputs])
    shuffled = estimate_importance(model, inputs[torch.randperm(7)].split(2))
    merged = Importance.merge(
        estimate_importance(model, [inputs[:2]]),
        estimate_importance(model, inputs[2:5].split(1)),
        estimate_importance(model, [inputs[5:]]),
    )
    assert merged.num_samples == 7
    for other in (shuffled, merged):
        assert_equal(other, dict(together))


def test_does_not_depend_on_the_size_of_the_last_batch():
    model, inputs = make("mlp")
    assert_equal(estimate_importance(model, inputs.split(3)), dict(estimate_importance(model, [inputs])))


def test_scaling_the_output_by_c_scales_importance_by_c_squared():
    model, inputs = make("conv")
    plain = estimate_importance(model, [inputs])
    scaled = estimate_importance(model, [inputs], embed=lambda model, batch: 3 * model(batch))
    assert_equal(scaled, {name: 9 * value for name, value in plain.items()})


@pytest.mark.parametrize("output", ["squared_norm", "vector", "projection"])
def test_batch_granularity_with_batches_of_one_is_the_definition(output):
    model, inputs = make("batch norm")
    exact = estimate_importance(model, [inputs], output=output)
    assert_equal(estimate_importance(model, inputs.split(1), granularity="batch", output=output), dict(exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_summed_in_float32(dtype):
    model, inputs = make("conv")
    exact = estimate_importance(model, [inputs])
    lower = estimate_importance(model.to(dtype), inputs.to(dtype).split(3))
    for name, value in exact.items():
        assert lower[name].dtype == torch.float32
        assert (lower[name] - value).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * value.norm()


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm", "class token", "called twice", "used outside its layer"])
def test_autocast_is_close_and_summed_in_float32(name):
    model, inputs = make(name)
    exact = estimate_importance(model, [inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = estimate_importance(model.float(), inputs.float().split(3))
    for name, value in exact.items():
        assert lower[name].dtype == torch.float32
        assert (lower[name] - value).norm() <= 5e-2 * value.norm(), name


def test_rms_norm_of_small_inputs_in_half_precision():
    torch.manual_seed(0)
    model, inputs = nn.RMSNorm(6), torch.randn(5, 6) * 1e-3
    exact = estimate_importance(model, [inputs])["weight"]
    lower = estimate_importance(model.bfloat16(), [inputs.bfloat16()])["weight"]
    assert (lower - exact).norm() < 0.05 * exact.norm()
