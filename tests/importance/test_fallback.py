from importance_cases import assert_equal, make
from oracles import per_sample_importance

from mas_embed import estimate_importance


def test_vmap_is_used_for_every_output(monkeypatch):
    model, inputs = make("layers without a rule")
    monkeypatch.setattr("mas_embed.importance.fallback.PerSampleGradients._sums_by_loop", None)
    for output in ("squared_norm", "vector", "projection"):
        estimate_importance(model, [inputs], output=output)


def test_the_result_requires_no_gradient():
    model, inputs = make("layers without a rule")
    importance = estimate_importance(model, [inputs])
    assert not any(importance[name].requires_grad for name in importance)


def test_parameters_that_only_embed_uses_are_included():
    model, inputs = make("mlp")
    weight = model[2].weight
    embed = lambda model, batch: model(batch) @ weight[:, :3]  # noqa: E731
    expected = per_sample_importance(model, inputs.split(1), lambda sample: [embed(model, sample).square().sum()])
    assert_equal(estimate_importance(model, inputs.split(3), embed=embed), expected)


def test_the_parameters_are_restored_in_a_module_with_two_names():
    model, inputs = make("one module two names")
    parameters = dict(model.named_parameters())
    estimate_importance(model, [inputs])
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model(inputs).requires_grad
