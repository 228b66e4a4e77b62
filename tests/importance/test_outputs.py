import numpy as np
import pytest
import torch
import torch.nn.functional as F
from importance_cases import assert_equal, make
from oracles import per_sample_importance
from torch import nn

from mas_embed import Projection, UserError, estimate_importance


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm", "class token", "recurrent", "tied"])
def test_vector_output_sums_over_every_unit(name):
    model, inputs = make(name)
    expected = per_sample_importance(model, inputs.split(1), lambda sample: list(model(sample)[0]))
    assert_equal(estimate_importance(model, inputs.split(3), output="vector"), expected)


@pytest.mark.parametrize("name", ["mlp", "batch norm", "class token", "recurrent"])
@pytest.mark.parametrize("num_directions", [1, 2, 5])
def test_projection_is_the_mean_over_directions_of_the_unit_embedding(name, num_directions):
    model, inputs = make(name)
    output = Projection(num_directions=num_directions, seed=3)
    size = model(inputs).shape[1]
    # The value of an embedding that is a unit vector e_i is entry i of every direction
    directions = output.values(torch.eye(size, dtype=torch.float64), None).T
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(num_directions, dtype=torch.float64))
    count = min(size, num_directions)
    torch.testing.assert_close(directions[:count] @ directions[:count].T, torch.eye(count, dtype=torch.float64))

    def outputs_of(sample):
        embedding = model(sample)[0]
        return [(embedding / embedding.norm()).dot(direction) for direction in directions]

    expected = per_sample_importance(model, inputs.split(1), outputs_of, reduce="mean")
    assert_equal(estimate_importance(model, inputs.split(3), output=output), expected)


def test_directions_depend_on_the_seed_only():
    embeddings = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(Projection(seed=1).values(embeddings, None), Projection(seed=1).values(embeddings, None))
    assert not torch.equal(Projection(seed=1).values(embeddings, None), Projection(seed=2).values(embeddings, None))


def test_projection_estimates_the_expectation_over_directions():
    # Over a complete orthonormal basis the mean of <v, u>^2 is exactly 1 / D
    unit = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64))
    values = Projection(num_directions=5).values(unit, None)
    torch.testing.assert_close(values.square().mean(1), torch.full((6,), 1 / 5, dtype=torch.float64))


def test_projection_is_not_zero_for_normalized_embeddings():
    model, inputs = make("mlp")
    importance = estimate_importance(
        model, [inputs], output="projection", embed=lambda model, batch: F.normalize(model(batch))
    )
    assert all(bool(value.any()) for value in importance.values())


@pytest.mark.parametrize("output", ["squared_norm", "vector", "projection"])
def test_an_all_zero_embedding_has_zero_importance(output):
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.bias)
    importance = estimate_importance(model, [torch.zeros(4, 3, dtype=torch.float64)], output=output)
    assert torch.equal(importance["weight"], torch.zeros(2, 3, dtype=torch.float64))
    assert bool(importance["bias"].isfinite().all())


def test_callable_output_gets_the_batch():
    model, inputs = make("class token")
    weights = torch.rand(7, dtype=torch.float64)
    samples = [(inputs[i : i + 1], weights[i : i + 1]) for i in range(7)]
    expected = per_sample_importance(model, samples, lambda sample: [(model(sample[0])[0] ** 3).sum() * sample[1][0]])
    batches = [(inputs[:4], weights[:4]), (inputs[4:], weights[4:])]
    assert_equal(estimate_importance(model, batches, output=lambda z, batch: (z**3).sum(1) * batch[1]), expected)


def test_callable_output_of_a_wrong_shape_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match=r"one value per sample, shape \[7\], got \[\]"):
        estimate_importance(model, [inputs], output=lambda z, batch: z.sum())
    with pytest.raises(UserError, match=r"one value per sample, shape \[7\], got NoneType"):
        estimate_importance(model, [inputs], output=lambda z, batch: None)


def test_invalid_outputs_are_refused():
    for output in (3, Projection, None, {}, torch.zeros(2)):
        with pytest.raises(UserError, match="output must be one of squared_norm"):
            estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6)], output=output)
    with pytest.raises(UserError, match="num_directions must be at least 1"):
        Projection(num_directions=0)
    for value in (1.5, True, "8", None):
        with pytest.raises(UserError, match="num_directions must be a whole number, got"):
            Projection(num_directions=value)
        with pytest.raises(UserError, match="seed must be a whole number >= 0"):
            Projection(seed=value)
    assert Projection(num_directions=np.int64(2)) == Projection(num_directions=2)


def test_squared_norm_of_unit_length_embeddings_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="unit length.*output='projection'.*embed="):
        estimate_importance(model, [inputs], embed=lambda model, batch: F.normalize(model(batch)))


def test_squared_norm_of_constant_length_embeddings_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="of constant length.*output='projection'"):
        estimate_importance(model, inputs.split(3), embed=lambda model, batch: 64 * F.normalize(model(batch)))
