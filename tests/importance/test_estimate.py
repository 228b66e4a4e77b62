import pytest
import torch
import torch.nn.functional as F
from oracles import per_sample_importance, squared_norm
from torch import nn

from mas_embed import Importance, Projection, UserError, estimate_importance, explain_coverage


class TwoLinears(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))))


class UsedOutsideItsLayer(nn.Module):
    """The layer runs once, and its weight is used once more as a plain tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) + torch.tanh(x) @ self.layer.weight.abs()


class CalledInVain(nn.Module):
    """The layer's output is thrown away; its weight is used as a plain tensor, once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        self.layer(x)
        return F.linear(torch.sin(x), self.layer.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(()))
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])[:, 0] * self.scale


class PositionsFirst(nn.Module):
    """The layer sees [T, N, I]: its first dimension is not the samples, even where T equals N."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(0, 1))).mean(0)


class FoldedPositions(nn.Module):
    """The layer sees [N * T, I]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(0, 1))).view(len(x), -1, 4).mean(1)


class SharedBranch(nn.Module):
    """Residual, in-place activations, a frozen and an unused layer, and data-dependent control flow."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.head, self.unused = nn.BatchNorm2d(4), nn.Linear(4, 3), nn.Linear(2, 2)
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.prelu = nn.PReLU(4)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        if x.sum() > -1:  # always true, but vmap cannot know
            x = x + F.relu_(self.branch(self.frozen(x)))
        return self.head(self.prelu(self.norm(x)).mean((2, 3)))


class SquaredReLU(nn.Module):
    """An activation with a parameter that no rule knows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return torch.relu(x) ** 2 * self.scale


class WordEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.words(x).tanh().mean(1))


class OneModuleTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.norm, self.head = self.net[1], nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.net(x)) + self.norm(x))


class KeptInAList(nn.Module):
    """A parameter, and a layer's weight, that are reached by another reference than their name."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.kept = [self.scale, self.layer.weight]

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.kept[0] @ self.kept[1]


class CalledWithOtherWeights(nn.Module):
    """The layer runs once, with a weight that is computed from its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        other = {"weight": self.layer.weight.T, "bias": self.layer.bias * 2}
        return torch.func.functional_call(self.layer, other, (x,))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=self.use_reentrant)
        return self.head(x)


def changed_after_making():
    """The idiom of dilated ResNets: padding and dilation are set after the layer was made."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    model[0].padding = model[0].dilation = (2, 2)
    return model


def conv(*args, size=7, **kwargs):
    return lambda: nn.Sequential(nn.Conv2d(*args, **kwargs), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5)), (
        args[0],
        size,
        size,
    )


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "linear over positions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)),
        (2, 3, 3),
    ),
    "conv": conv(3, 4, 3),
    "conv stride padding dilation": conv(3, 4, 3, stride=2, padding=2, dilation=2),
    "conv uneven": conv(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2), bias=False),
    "conv groups": conv(4, 6, 3, groups=2, padding=1),
    "conv depthwise": conv(4, 8, 3, groups=4, padding=1),
    "conv same": conv(2, 4, (3, 5), padding="same"),
    "conv valid": conv(2, 4, 4, padding="valid"),
    "conv circular": conv(2, 4, 3, padding=2, padding_mode="circular"),
    "conv reflect": conv(2, 4, 3, padding=(1, 2), padding_mode="reflect", stride=2),
    "conv replicate": conv(2, 4, 3, padding="same", padding_mode="replicate", dilation=2),
    "conv leaves a rest": conv(2, 4, 3, stride=3, size=8),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
        (2, 5, 5),
    ),
    "other layers": (
        lambda: nn.Sequential(nn.Linear(6, 4), SquaredReLU(), nn.Linear(4, 4), SquaredReLU(), nn.Linear(4, 3)),
        (6,),
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1, stride=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        ),
        (2, 6),
    ),
    "conv1d same, uneven": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 4, padding="same", dilation=2, groups=2), nn.Flatten(), nn.LazyLinear(3)),
        (2, 9),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 0, 2), groups=2), nn.BatchNorm3d(4), nn.Flatten(), nn.LazyLinear(3)
        ),
        (2, 3, 4, 3),
    ),
    "transposed conv1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3, stride=3, output_padding=2), nn.Flatten(), nn.LazyLinear(3)),
        (2, 5),
    ),
    "transposed conv2d": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        (4, 4, 5),
    ),
    "transposed conv3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(2, 3, 2, bias=False), nn.Flatten(), nn.LazyLinear(3)),
        (2, 3, 2, 3),
    ),
    "batch norm of vectors": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (6,)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.PReLU(6), nn.Flatten(), nn.LazyLinear(3)),
        (2, 5, 5),
    ),
    "group norm of vectors": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)), (6,)),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
        ),
        (2, 5, 5),
    ),
    "instance norm with running statistics": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        (2, 6),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((5, 4)), nn.PReLU(), nn.Flatten(), nn.Linear(20, 3)),
        (5, 3),
    ),
    "layer norm over positions": (
        lambda: nn.Sequential(nn.LayerNorm(3, bias=False), nn.Linear(3, 4), nn.Flatten(), nn.LazyLinear(3)),
        (2, 4, 3),
    ),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Flatten(), nn.LazyLinear(3)), (5, 3)),
    "rms norm with eps": (lambda: nn.Sequential(nn.RMSNorm((2, 3), eps=0.1), nn.Flatten(), nn.LazyLinear(3)), (2, 3)),
    "prelu": (lambda: nn.Sequential(nn.PReLU(2), nn.Flatten(), nn.LazyLinear(3), nn.PReLU()), (2, 5)),
    "look-up": (WordEmbedder, "words"),
    "look-up of one word": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), "word"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2)),
        (6,),
    ),
    "tied": (TwoLinears, (6,)),
    "called twice": (CalledTwice, (6,)),
    "used outside its layer": (UsedOutsideItsLayer, (6,)),
    "called in vain": (CalledInVain, (6,)),
    "recurrent": (Recurrent, (4, 3)),
    "class token": (ClassToken, (4, 6)),
    "positions first": (PositionsFirst, (7, 3)),
    "folded positions": (FoldedPositions, (4, 3)),
    "shared branch": (SharedBranch, (2, 5, 5)),
    "one module two names": (OneModuleTwoNames, (6,)),
    "kept in a list": (KeptInAList, (6,)),
    "called with other weights": (CalledWithOtherWeights, (6,)),
    "checkpointed": (Checkpointed, (6,)),
    "conv changed after making": (changed_after_making, (2, 7, 7)),
}


def make(name, num_samples=7):
    torch.manual_seed(0)
    build, shape = CASES[name]
    words = {"words": (num_samples, 6), "word": (num_samples,)}.get(shape)
    inputs = torch.randint(9, words) if words else torch.randn(num_samples, *shape, dtype=torch.float64)
    model = build().double()
    model.eval()(inputs)  # sets the size of lazy layers
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, inputs


def assert_equal(importance, expected, rtol=1e-10):
    assert importance.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            importance[name], value, rtol=rtol, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


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


def test_directions_depend_on_the_seed_alone():
    embeddings = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(Projection(seed=1).values(embeddings, None), Projection(seed=1).values(embeddings, None))
    assert not torch.equal(Projection(seed=1).values(embeddings, None), Projection(seed=2).values(embeddings, None))


def test_projection_estimates_the_expectation_over_directions():
    # Over a complete orthonormal basis the mean of <v, u>^2 is exactly 1 / D
    unit = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64))
    values = Projection(num_directions=5).values(unit, None)
    torch.testing.assert_close(values.square().mean(1), torch.full((6,), 1 / 5, dtype=torch.float64))


def test_callable_output_sees_the_batch():
    model, inputs = make("class token")
    weights = torch.rand(7, dtype=torch.float64)
    samples = [(inputs[i : i + 1], weights[i : i + 1]) for i in range(7)]
    expected = per_sample_importance(model, samples, lambda sample: [(model(sample[0])[0] ** 3).sum() * sample[1][0]])
    batches = [(inputs[:4], weights[:4]), (inputs[4:], weights[4:])]
    assert_equal(estimate_importance(model, batches, output=lambda z, batch: (z**3).sum(1) * batch[1]), expected)


def test_callable_output_of_a_wrong_shape_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match=r"one value a sample, shape \[7\], got \[\]"):
        estimate_importance(model, [inputs], output=lambda z, batch: z.sum())


@pytest.mark.parametrize("name", ["mlp", "conv", "class token", "shared branch"])
def test_order_and_merging_change_nothing(name):
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


def test_scaling_the_output_by_c_scales_importance_by_c_squared():
    model, inputs = make("conv")
    plain = estimate_importance(model, [inputs])
    scaled = estimate_importance(model, [inputs], embed=lambda model, batch: 3 * model(batch))
    assert_equal(scaled, {name: 9 * value for name, value in plain.items()})


def test_opposite_gradients_do_not_cancel_but_do_in_the_batch_variant():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    # Embeddings 3 and -1; gradients of the square 2 F x = (6, 6) and (-2, 2)
    inputs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert estimate_importance(model, [inputs])["weight"].tolist() == [[4.0, 4.0]]
    assert estimate_importance(model, [inputs], granularity="batch")["weight"].tolist() == [[2.0, 4.0]]
    assert estimate_importance(model, [inputs], granularity="batch", exponent=2)["weight"].tolist() == [[8.0, 32.0]]


@pytest.mark.parametrize("output", ["squared_norm", "vector", "projection"])
def test_batch_granularity_with_batches_of_one_is_the_definition(output):
    model, inputs = make("batch norm")
    exact = estimate_importance(model, [inputs], output=output)
    assert_equal(estimate_importance(model, inputs.split(1), granularity="batch", output=output), dict(exact))


def test_a_short_last_batch_weighs_by_its_samples():
    model, inputs = make("mlp")
    assert_equal(estimate_importance(model, inputs.split(3)), dict(estimate_importance(model, [inputs])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_summed_in_float32(dtype):
    model, inputs = make("conv")
    exact = estimate_importance(model, [inputs])
    lower = estimate_importance(model.to(dtype), inputs.to(dtype).split(3))
    for name, value in exact.items():
        assert lower[name].dtype == torch.float32
        assert (lower[name] - value).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * value.norm()


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm", "class token", "called twice", "used outside its layer"])
def test_under_autocast_it_is_close_and_summed_in_float32(name):
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


def test_gradients_that_are_not_finite_are_refused():
    model = nn.Linear(6, 3)
    with pytest.raises(UserError, match="gradient of weight, bias is NaN or infinite"):
        estimate_importance(model, [torch.randn(4, 6)], embed=lambda model, batch: 1 + (model(batch) * 0).abs().sqrt())


def test_an_output_that_is_none():
    for output in (3, Projection):
        with pytest.raises(UserError, match="output must be one of squared_norm"):
            estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6)], output=output)
    with pytest.raises(UserError, match="num_directions must be at least 1"):
        Projection(num_directions=0)


def test_blocks_of_samples_do_not_change_the_sum(monkeypatch):
    model, inputs = make("linear over positions")
    expected = dict(estimate_importance(model, [inputs]))
    monkeypatch.setattr("mas_embed.importance.rules.memory.BLOCK_BYTES", 1)
    monkeypatch.setattr("mas_embed.importance.fallback.CHUNK_BYTES", 1)
    assert_equal(estimate_importance(model, [inputs]), expected)
    model, inputs = make("class token")
    assert_equal(
        estimate_importance(model, [inputs]), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )


@pytest.mark.parametrize(
    "batch_of",
    [lambda x: x, lambda x: (x, "labels"), lambda x: [x, torch.zeros(7)], lambda x: {"input": x, "labels": None}],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_every_kind_of_batch(batch_of):
    model, inputs = make("mlp")
    assert_equal(estimate_importance(model, [batch_of(inputs)]), dict(estimate_importance(model, [inputs])))


def test_a_model_that_takes_several_inputs_by_keyword():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(2)
            return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

    torch.manual_seed(0)
    model = Masked().double()
    batch = {
        "input_ids": torch.randint(10, (5, 6)),
        "attention_mask": torch.ones(5, 6, dtype=torch.long),
        "labels": torch.arange(5),
    }
    batch["attention_mask"][:, 4:] = 0
    samples = [{key: value[i : i + 1] for key, value in batch.items() if key != "labels"} for i in range(5)]
    expected = per_sample_importance(model, samples, lambda sample: [model(**sample)[0].square().sum()])
    assert_equal(estimate_importance(model, [batch]), expected)


def test_embed_by_method_name_and_by_callable():
    model, inputs = make("mlp")
    model.twice = lambda inputs: 2 * model(inputs)
    expected = {name: 4 * value for name, value in estimate_importance(model, [inputs]).items()}
    assert_equal(estimate_importance(model, [inputs], embed="twice"), expected)
    assert_equal(estimate_importance(model, [inputs], embed=lambda model, batch: 2 * model(batch)), expected)


@pytest.mark.parametrize("output", ["squared_norm", "vector", "projection"])
def test_an_all_zero_embedding_has_zero_importance(output):
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.bias)
    importance = estimate_importance(model, [torch.zeros(4, 3, dtype=torch.float64)], output=output)
    assert torch.equal(importance["weight"], torch.zeros(2, 3, dtype=torch.float64))
    assert bool(importance["bias"].isfinite().all())


def test_squared_norm_of_unit_length_embeddings_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="unit length.*output='projection'.*embed="):
        estimate_importance(model, [inputs], embed=lambda model, batch: F.normalize(model(batch)))


def test_projection_sees_what_the_norm_cannot():
    model, inputs = make("mlp")
    importance = estimate_importance(
        model, [inputs], output="projection", embed=lambda model, batch: F.normalize(model(batch))
    )
    assert all(bool(value.any()) for value in importance.values())


def test_samples_that_mix_are_refused():
    inputs = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(UserError, match="cannot embed samples without the others|changes with the other samples"):
        estimate_importance(model, [inputs])
    with pytest.raises(UserError, match="changes with the other samples of its batch"):
        estimate_importance(
            nn.Linear(4, 3).double(), [inputs], embed=lambda model, batch: model(batch) - model(batch).mean(0)
        )


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (torch.zeros(2, 6), "iterable of batches, got one Tensor"),
        ({"x": torch.zeros(2, 6)}, "iterable of batches, got one dict"),
    ],
)
def test_what_are_no_batches(batches, message):
    with pytest.raises(UserError, match=message):
        estimate_importance(nn.Linear(6, 2), batches)


def test_bad_arguments():
    inputs = [torch.randn(2, 6)]
    with pytest.raises(UserError, match="granularity must be 'sample' or 'batch', got 'item'"):
        estimate_importance(nn.Linear(6, 2), inputs, granularity="item")
    with pytest.raises(UserError, match="exponent must be 1"):
        estimate_importance(nn.Linear(6, 2), inputs, exponent=3)
    with pytest.raises(UserError, match="did you mean 'squared_norm'"):
        estimate_importance(nn.Linear(6, 2), inputs, output="squared_nrom")
    with pytest.raises(UserError, match="no trainable parameter"):
        estimate_importance(nn.Linear(6, 2).requires_grad_(False), inputs)
    with pytest.raises(UserError, match=r"shape \[N, D\], got \[2, 2, 3\]"):
        estimate_importance(nn.Linear(6, 3), [torch.randn(2, 2, 6)])
    with pytest.raises(UserError, match="must return a tensor"):
        estimate_importance(nn.LSTM(6, 3), inputs)
    with pytest.raises(UserError, match="NaN"):
        estimate_importance(nn.Linear(6, 3), [torch.full((2, 6), torch.nan)])


def test_frozen_parameters_are_left_out_and_unused_ones_are_zero():
    model, inputs = make("shared branch")
    importance = estimate_importance(model, [inputs])
    assert not any(name.startswith("frozen") for name in importance)
    assert not importance["unused.weight"].any()
    ways = explain_coverage(model, inputs).way
    assert (ways["frozen.weight"], ways["unused.weight"], ways["stem.weight"]) == ("frozen", "unused", "rule")


@pytest.mark.parametrize(
    ("name", "by_fallback"),
    [
        ("mlp", set()),
        ("batch norm", set()),
        ("conv circular", set()),
        ("conv1d same, uneven", set()),
        ("conv3d", set()),
        ("transposed conv2d", set()),
        ("group norm", set()),
        ("instance norm", set()),
        ("instance norm with running statistics", {"1.weight", "1.bias"}),
        ("layer norm", set()),
        ("rms norm", set()),
        ("prelu", set()),
        ("look-up", set()),
        ("look-up of one word", set()),
        ("other layers", {"1.scale", "3.scale"}),
        ("tied", {"first.weight"}),
        ("called twice", {"layer.weight", "layer.bias"}),
        ("used outside its layer", {"layer.weight"}),
        ("called in vain", {"layer.weight"}),
        ("positions first", {"layer.weight", "layer.bias"}),
        ("folded positions", {"layer.weight", "layer.bias"}),
    ],
)
def test_coverage_names_every_parameter_once(name, by_fallback):
    model, inputs = make(name)
    coverage = explain_coverage(model, inputs)
    assert [row.name for row in coverage] == [name for name, _ in model.named_parameters()]
    assert {row.name for row in coverage if row.way == "fallback"} == by_fallback


def test_the_result_of_the_fallback_holds_no_graph():
    model, inputs = make("other layers")
    importance = estimate_importance(model, [inputs])
    assert not any(importance[name].requires_grad for name in importance)


def test_a_users_hook_and_a_patched_layer_do_not_mislead_the_rules():
    model, inputs = make("mlp")
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    model[2].forward = lambda x: F.linear(x, model[2].weight * 3, model[2].bias)
    assert_equal(
        estimate_importance(model, inputs.split(3)), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )


def test_a_hook_for_all_modules_does_not_mislead_the_rules():
    model, inputs = make("mlp")
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, args, output: 2 * output if isinstance(layer, nn.Linear) else None
    )
    try:
        importance = estimate_importance(model, inputs.split(3))
        expected = per_sample_importance(model, inputs.split(1), squared_norm(model))
    finally:
        handle.remove()
    assert_equal(importance, expected)


def test_a_class_patched_for_all_its_layers_does_not_mislead_the_rules(monkeypatch):
    model, inputs = make("mlp")
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert_equal(
        estimate_importance(model, [inputs]), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )


def test_parameters_that_only_embed_knows_of_are_seen():
    model, inputs = make("mlp")
    weight = model[2].weight
    embed = lambda model, batch: model(batch) @ weight[:, :3]  # noqa: E731
    expected = per_sample_importance(model, inputs.split(1), lambda sample: [embed(model, sample).square().sum()])
    assert_equal(estimate_importance(model, inputs.split(3), embed=embed), expected)


def test_the_model_is_whole_after_a_module_with_two_names():
    model, inputs = make("one module two names")
    parameters = dict(model.named_parameters())
    estimate_importance(model, [inputs])
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert model(inputs).requires_grad


def test_gradients_that_nothing_carries_are_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="carry no gradient: the model detaches"):
        estimate_importance(model, [inputs], embed=torch.no_grad()(lambda model, batch: model(batch)))
    with pytest.raises(UserError, match="use_reentrant=False"):
        estimate_importance(Checkpointed(use_reentrant=True).double(), [inputs])


@pytest.mark.parametrize(
    "couple",
    [lambda y: y + y.mean(0) ** 2, lambda y: y.cumsum(0), lambda y: y.flip(0), lambda y: 300 + y + 3 * y.mean(0)],
    ids=["mean", "causal", "flipped", "small beside a constant"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_coupled_samples_are_refused_in_whatever_batch(couple, first):
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 3), torch.randn(7, 6)
    with pytest.raises(UserError, match=f"batch {first}: a sample's embedding changes"):
        estimate_importance(model, [inputs[:1]] * first + [inputs], embed=lambda model, batch: couple(model(batch)))


def test_positions_first_are_seen_where_shapes_change_between_batches():
    model = PositionsFirst().double()
    batches = [torch.randn(n, t, 3, dtype=torch.float64) for n, t in ((1, 1), (4, 1), (5, 5), (1, 5), (3, 5))]
    samples = [sample for batch in batches for sample in batch.split(1)]
    assert_equal(estimate_importance(model, batches), per_sample_importance(model, samples, squared_norm(model)))


def test_squared_norm_of_any_constant_length_is_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="of constant length.*output='projection'"):
        estimate_importance(model, inputs.split(3), embed=lambda model, batch: 64 * F.normalize(model(batch)))


def test_a_lazy_complex_or_empty_model_or_batch():
    with pytest.raises(UserError, match=r"'weight' has no shape yet"):
        estimate_importance(nn.LazyLinear(3), [torch.randn(2, 6)])
    with pytest.raises(UserError, match=r"'weight' is complex"):
        estimate_importance(nn.Linear(6, 2, dtype=torch.complex64), [torch.randn(2, 6)])
    with pytest.raises(UserError, match="batch 1: the batch is empty"):
        estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6), torch.randn(0, 6)])


def test_the_fallback_is_vectorized_for_every_output(monkeypatch):
    model, inputs = make("other layers")
    monkeypatch.setattr("mas_embed.importance.fallback.PerSampleGradients._looped", None)
    for output in ("squared_norm", "vector", "projection"):
        estimate_importance(model, [inputs], output=output)


def test_an_input_changed_in_place_after_its_use_is_refused():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.layer.weight.requires_grad_(False)

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x.zero_()
            return y

    model = Overwriting().double()
    with pytest.raises(UserError, match="modified in place"):
        estimate_importance(model, [torch.randn(4, 6, dtype=torch.float64)])
