import pytest
from importance_cases import assert_equal, make
from oracles import per_sample_importance, squared_norm

from mas_embed import estimate_importance, explain_coverage


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model, inputs = make("shared branch")
    importance = estimate_importance(model, [inputs])
    assert not any(name.startswith("frozen") for name in importance)
    assert not importance["unused.weight"].any()
    coverage = explain_coverage(model, inputs)
    assert [coverage[f"{layer}.weight"] for layer in ("frozen", "unused", "stem")] == ["frozen", "unused", "rule"]


USED_BY_SAMPLES = (  # parameters that the samples use in matrix products, broadcasts or look-ups, outside a layer with a rule
    *("class token", "attention", "attention, batch first", "attention, added keys", "attention without bias"),
    *("transformer encoder", "transformer encoder, norm first", "bags", "low rank", "rows of a weight", "weight norm"),
    *("recurrent", "gated recurrent", "recurrent, all positions", "tied", "called twice", "used outside its layer"),
    *("layer output unused", "shared and not", "positions added first", "positions first", "shared positions"),
    "shared in every layer",
)
ONLY_RULES = (
    *("mlp", "batch norm", "conv circular", "conv1d same, uneven", "conv3d", "transposed conv2d", "group norm"),
    *("instance norm", "layer norm", "rms norm", "prelu", "embedding", "embedding of one word", *USED_BY_SAMPLES),
)
BY_FALLBACK = {
    "instance norm with running statistics": {"1.weight", "1.bias"},
    "layers without a rule": {"1.scale", "3.scale"},
    "shared in another order": {"bias"},
    "shared otherwise in large batches": {"bias"},
    "scaled product": {"weight", "bias"},
    "folded positions": {"layer.weight", "layer.bias"},
    "one module two names": {"net.1.weight", "net.1.bias"},
    "called with other weights": {"layer.weight", "layer.bias"},
}


@pytest.mark.parametrize(("name", "by_fallback"), [*((name, set()) for name in ONLY_RULES), *BY_FALLBACK.items()])
def test_every_parameter_has_one_row(name, by_fallback):
    model, inputs = make(name)
    coverage = explain_coverage(model, inputs)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(row.name, row.shape) for row in coverage.rows] == shapes
    assert list(coverage) == [name for name, _ in shapes]
    assert {name for name, kind in coverage.items() if kind == "fallback"} == by_fallback


@pytest.mark.parametrize("num_samples", [2, 4, 5, 6])
@pytest.mark.parametrize("name", USED_BY_SAMPLES)
def test_a_rule_is_used_and_exact_whatever_the_number_of_samples(name, num_samples):
    model, inputs = make(name, num_samples)  # some numbers equal the number of positions or of features
    expected = per_sample_importance(model, inputs.split(1), squared_norm(model))
    assert_equal(estimate_importance(model, [inputs]), expected)
    assert "fallback" not in explain_coverage(model, inputs).values()
