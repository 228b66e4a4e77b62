import pytest
from importance_cases import make

from mas_embed import estimate_importance, explain_coverage


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model, inputs = make("shared branch")
    importance = estimate_importance(model, [inputs])
    assert not any(name.startswith("frozen") for name in importance)
    assert not importance["unused.weight"].any()
    coverage = explain_coverage(model, inputs)
    assert [coverage[f"{layer}.weight"] for layer in ("frozen", "unused", "stem")] == ["frozen", "unused", "rule"]


ONLY_RULES = (
    *("mlp", "batch norm", "conv circular", "conv1d same, uneven", "conv3d", "transposed conv2d", "group norm"),
    *("instance norm", "layer norm", "rms norm", "prelu", "embedding", "embedding of one word"),
    *("shared positions", "shared in every layer"),
)
BY_FALLBACK = {
    "instance norm with running statistics": {"1.weight", "1.bias"},
    "layers without a rule": {"1.scale", "3.scale"},
    "shared in another order": {"bias"},
    "shared and not": {"bias"},
    "positions added first": {"bias"},
    "class token": {
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    },
    "tied": {"first.weight"},
    "called twice": {"layer.weight", "layer.bias"},
    "used outside its layer": {"layer.weight"},
    "layer output unused": {"layer.weight"},
    "positions first": {"layer.weight", "layer.bias"},
    "folded positions": {"layer.weight", "layer.bias"},
}


@pytest.mark.parametrize(("name", "by_fallback"), [*((name, set()) for name in ONLY_RULES), *BY_FALLBACK.items()])
def test_every_parameter_has_one_row(name, by_fallback):
    model, inputs = make(name)
    coverage = explain_coverage(model, inputs)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(row.name, row.shape) for row in coverage.rows] == shapes
    assert list(coverage) == [name for name, _ in shapes]
    assert {name for name, kind in coverage.items() if kind == "fallback"} == by_fallback
