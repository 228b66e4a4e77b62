import copy
from functools import partial

import pytest
import torch
from small import train
from torch import nn

from mas_embed import ClassStatistics, Combine, Finetune, LwF, Replay, UserError
from mas_embed.methods.class_statistics import ClassGaussian
from mas_embed.models import backbone

POINTS = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]]).double()


def scatter_by_loop(rows):
    """The mean [F] and sum of outer products around it [F][F], in plain Python."""
    rows = rows.tolist()
    size = len(rows[0])
    mean = [sum(row[i] for row in rows) / len(rows) for i in range(size)]
    return mean, [
        [sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) for j in range(size)] for i in range(size)
    ]


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)]
    return nn.Sequential(*layers).double()


def batches(classes, num=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat(num)
    return [(labels[:, None] + torch.rand(len(labels), 2, generator=generator).double(), labels)]


def matrix(gaussian):
    return gaussian.root.T @ gaussian.root


def test_the_oracle_by_hand():
    mean, scatter = scatter_by_loop(POINTS)
    # around (1, 2): (-1, -1), (1, -1), (0, 2)
    assert mean == [1.0, 2.0]
    assert scatter == [[2.0, 0.0], [0.0, 6.0]]


def test_statistics_by_hand():
    gaussian = ClassGaussian.from_samples(POINTS)
    assert gaussian.count == 3
    assert gaussian.mean.tolist() == [1.0, 2.0]
    torch.testing.assert_close(matrix(gaussian), torch.diag(torch.tensor([2.0, 6.0])).double())
    assert (gaussian.low.tolist(), gaussian.high.tolist()) == ([0.0, 1.0], [2.0, 4.0])
    # the principal direction is the second axis
    first = ClassGaussian.from_samples(POINTS, rank=1)
    torch.testing.assert_close(matrix(first), torch.diag(torch.tensor([0.0, 6.0])).double())
    assert ClassGaussian.from_samples(POINTS, rank=0).root.shape == (0, 2)


@pytest.mark.parametrize("num", [3, 20])
def test_classes_seen_again_are_one_gaussian_of_all_samples(num):
    first = torch.randn(num, 5, generator=torch.Generator().manual_seed(0)).double()
    second = 3 + torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()
    both = ClassGaussian.from_samples(first).merged_with(ClassGaussian.from_samples(second))
    mean, scatter = scatter_by_loop(torch.cat([first, second]))
    assert both.count == num + 7
    torch.testing.assert_close(both.mean, torch.tensor(mean, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(matrix(both), torch.tensor(scatter, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert torch.equal(both.low, torch.cat([first, second]).amin(0))
    assert torch.equal(both.high, torch.cat([first, second]).amax(0))


def test_drawn_samples_have_the_mean_and_covariance_and_stay_in_the_range():
    wide = ClassGaussian.from_samples(POINTS)
    free = ClassGaussian(3, wide.mean, wide.root, wide.low - 100, wide.high + 100)
    drawn = free.draw(40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), wide.mean, rtol=0, atol=0.03)
    # the scatter over n - 1 = 2
    torch.testing.assert_close(torch.cov(drawn.T), torch.diag(torch.tensor([1.0, 3.0])).double(), rtol=0, atol=0.06)
    clipped = wide.draw(100, torch.Generator().manual_seed(0))
    assert bool((clipped >= wide.low).all() and (clipped <= wide.high).all())
    assert torch.equal(ClassGaussian.from_samples(POINTS[:1]).draw(2, torch.Generator()), POINTS[:1].expand(2, 2))


def test_equally_many_inputs_of_every_class_are_appended_to_the_batch():
    model = network()
    method = ClassStatistics(model, share=0.6)
    (inputs, labels) = batches([5, 6])[0]
    assert method.extend_batch(inputs, labels)[0] is inputs
    method.consolidate(batches([0, 3]))
    both, of_both = method.extend_batch(inputs, labels)
    assert torch.equal(both[:24], inputs)
    assert torch.equal(of_both[:24], labels)
    # 24 samples are .4 of 60
    assert both.shape == (60, 2)
    assert of_both[24:].unique(return_counts=True)[1].tolist() == [18, 18]
    for label in (0, 3):
        assert bool((both[24:][of_both[24:] == label] - label).abs().le(1).all())
    again, _ = method.extend_batch(inputs, labels)
    assert not torch.equal(again[24:], both[24:])
    embeddings = model(inputs)
    assert method.extend_embeddings(embeddings, labels)[0] is embeddings


def test_drawn_features_go_through_the_layers_above_as_in_a_plain_loop():
    model = network()
    method, twin = (ClassStatistics(model, layer="1", seed=3) for _ in range(2))
    inputs, labels = batches([5, 6])[0]
    for one in (method, twin):
        one.consolidate(batches([0, 3]))
        assert one.extend_batch(inputs, labels)[0] is inputs
    embeddings, of_both = method.extend_embeddings(model(inputs), labels)
    drawn, classes = twin._draw(labels)
    for row, label, features in zip(embeddings[24:], of_both[24:].tolist(), drawn, strict=True):
        for index in (2, 3, 4):
            features = model[index](features)
        torch.testing.assert_close(row, features, rtol=1e-10, atol=1e-12)
        assert label in classes
    embeddings[24:].sum().backward()
    assert not model[0].weight.grad.any()  # they have no gradient below the layer
    assert model[2].weight.grad is not None


def test_parameters_that_feed_the_layer_are_constant_after_the_first_split_under_any_optimizer():
    model = network()
    method = ClassStatistics(model, layer="1")
    method.consolidate(batches([0, 1]))
    assert sorted(method.held) == ["0.bias", "0.weight"]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    inputs, labels = batches([2, 3])[0]
    for _ in range(3):
        method.extend_batch(inputs, labels)
        embeddings, _ = method.extend_embeddings(model(inputs), labels)
        embeddings.square().sum().backward()
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()
    is_same = {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()}
    assert {name for name, same in is_same.items() if same} == {"0.bias", "0.weight"}
    # and so the statistics are still those of the first split's features
    _, scatter = scatter_by_loop(model[1](model[0](batches([0, 1])[0][0][0::2])).detach())
    torch.testing.assert_close(
        matrix(method.classes[0]), torch.tensor(scatter, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def test_a_share_of_zero_is_finetune():
    makers = (Finetune, partial(ClassStatistics, share=0.0), ClassStatistics)
    finetuned, without, drawn = (train(make)[0].state_dict().values() for make in makers)
    assert all(map(torch.equal, finetuned, without))
    assert not all(map(torch.equal, finetuned, drawn))


def test_memory_and_the_mark_of_stored_data():
    model = network()
    method = ClassStatistics(model, layer="1", rank=2)
    method.consolidate(batches([0, 1]))
    # two classes of (2 + 3) x 4 numbers, 12 constant parameters, and the shape, eight bytes each
    assert method.num_bytes == 8 * (2 * 5 * 4 + 12 + 1)
    assert ClassStatistics.keeps == "statistics"
    assert Combine(model, methods=[method, LwF(model)]).keeps == "statistics"
    assert Combine(model, methods=[method, Replay(model)]).keeps == "data"


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs):
        features = self.first(inputs)
        return self.third(self.second(features)) + features[:1]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)

    def forward(self, inputs):
        return self.first(self.first(inputs))


def test_batch_normalization_that_keeps_its_statistics_may_feed_the_layer():
    model = backbone(network="cifar_resnet20", weights="none", embedding_size=4, frozen_batch_norm=True)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
    method = ClassStatistics(model, layer="trunk")
    method.consolidate([(images, labels)])
    assert sorted(method.classes) == [0, 1] and "trunk.bn1.weight" in method.held
    modes = [module.training for module in model.modules()]
    with pytest.raises(UserError, match=r"'trunk.bn1.bias' feeds layer 'trunk', .* with frozen_batch_norm=True"):
        model.frozen_batch_norm = False
        ClassStatistics(model, layer="trunk").consolidate([(images, labels)])
    assert [module.training for module in model.modules()] == modes


def test_errors():
    model = network()
    with pytest.raises(UserError, match=r"unknown layer of the model '9'.*known: 0, 1, 2, 3, 4"):
        ClassStatistics(model, layer="9")
    with pytest.raises(UserError, match="rank must be at least 0, got -1"):
        ClassStatistics(model, rank=-1)
    with pytest.raises(UserError, match="share must be from 0 to below 1, got 1"):
        ClassStatistics(model, share=1.0)
    with pytest.raises(UserError, match="class_statistics fits a Gaussian to every class and needs batches of"):
        ClassStatistics(model).consolidate([torch.zeros(2, 2)])
    labels = torch.tensor([0, 1])
    with pytest.raises(UserError, match="a floating-point tensor, but the inputs are not; choose another layer"):
        ClassStatistics(model).consolidate([(torch.zeros(2, 2).long(), labels)])
    inputs = torch.randn(2, 2)
    with pytest.raises(UserError, match="'first.bias' feeds layer 'second' and also reaches the embeddings around it"):
        ClassStatistics(Around(), layer="second").consolidate([(inputs, labels)])
    with pytest.raises(UserError, match="layer 'first' is called 2 times"):
        ClassStatistics(Twice(), layer="first").consolidate([(inputs, labels)])
    normalised = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"batch normalisation '0.bias' feeds layer '1', and its statistics change"):
        ClassStatistics(normalised, layer="1").consolidate([(inputs, labels)])
    method = ClassStatistics(nn.Identity())
    method.consolidate([(inputs, labels)])
    with pytest.raises(UserError, match=r"features have shape \[3\], but had \[2\] in earlier splits"):
        method.consolidate([(torch.zeros(2, 3), labels)])
    with pytest.raises(UserError, match="lacks .*; it is not a state of ClassStatistics"):
        method.load_state_dict({})
