"""Built-in models pass `check_model`; every rule is violated by one that fails it with the right message."""

from functools import partial

import pytest
import torch
from torch import nn

from mas_embed import small_conv
from mas_embed.facts.networks import small_fact_conv
from mas_embed.models import backbone, word_vector_transformer
from mas_embed.recognition import multi_head
from mas_embed.testing import check_model

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "factory",
    [
        partial(small_conv, channels=3, width=4),
        partial(backbone, network="cifar_resnet20", weights="none", trunk_learning_rate=0.1),
        partial(
            backbone, network="resnet18", weights="none", head="mlp", frozen_up_to="layer1", frozen_batch_norm=True
        ),
        partial(backbone, network="mobilenet_v3_small", weights="none", is_normalized=False),
        partial(multi_head, trunk={"name": "small_conv", "channels": 3}, classes_per_split=[2, 3]),
        partial(small_fact_conv, vector_size=4, width=4),
    ],
    ids=["small_conv", "cifar_resnet20", "resnet18", "mobilenet", "multi_head", "facts"],
)
def test_models_of_images(factory):
    images = IMAGES
    if factory.func is small_fact_conv:
        images = IMAGES[:, :1]
    check_model(factory, images)


def test_a_model_of_texts(tmp_path):
    (tmp_path / "vectors.txt").write_text("turn 1 0 0.5\non 0 1 2\nthe 1 1 -1\nlight -1 0 1\n")
    factory = partial(word_vector_transformer, path=tmp_path / "vectors.txt", embedding_size=4, width=8, heads=2)
    check_model(factory, ["turn on the light", "light", "on the turn"])


# Rules that are violated

POINTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A network that breaks no rule; a subclass breaks one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        return self.layer(inputs)


def test_a_model_that_breaks_no_rule():
    check_model(Network, POINTS)
    check_model(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()), POINTS)


class DropsSamples(Network):
    def forward(self, inputs):
        return super().forward(inputs[:3])


class Squeezes(Network):
    def forward(self, inputs):
        return super().forward(inputs).squeeze()


class IsInfinite(Network):
    def forward(self, inputs):
        return super().forward(inputs) / 0


class DropsOut(Network):
    def forward(self, inputs):
        return nn.functional.dropout(super().forward(inputs))


class Counts(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs):
        self.count += 1
        return super().forward(inputs)


class LooksAround(Network):
    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(0))


class HidesAWeight(Network):
    def __init__(self):
        super().__init__()
        self.hidden = torch.randn(2)

    def forward(self, inputs):
        return super().forward(inputs) + self.hidden


class GrowsAtRandom(Network):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2 + int(torch.initial_seed() % 2))


class SeedsItself(Network):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(2, 3, generator=SeedsItself.generator))

    generator = torch.Generator().manual_seed(0)


class Detaches(Network):
    def forward(self, inputs):
        embeddings = super().forward(inputs)
        return embeddings.detach() if self.training else embeddings


class IsConstant(Network):
    def forward(self, inputs):
        return 0 * super().forward(inputs) + inputs[:, :2]


class StopsInTraining(Network):
    def forward(self, inputs):
        embeddings = super().forward(inputs)
        return 0 * embeddings if self.training else embeddings


class ForgetsTheBias(Network):
    def parameter_groups(self, lr):
        return [{"params": [self.layer.weight], "lr": lr}]


class CopiesNothing(Network):
    def __deepcopy__(self, memo):
        return Network()


class RefusesTensors(Network):
    def forward(self, inputs):
        return super().forward(inputs.numpy())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: torch.relu, "must be a torch.nn.Module, got a builtin_function_or_method"),
        (DropsSamples, r"5 inputs must be embedded as \[5, D\], got \[3, 2\]"),
        (Squeezes, r"must embed a batch of inputs as \[N, D\]"),
        (IsInfinite, "embeddings must be finite numbers"),
        (DropsOut, "in eval mode the embeddings must be the same each time"),
        (Counts, "in eval mode weights and buffers must not change, but 'count' does"),
        (LooksAround, "must not depend on the other inputs of the batch"),
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            "must embed a batch of inputs .* more than 1 value per channel",
        ),
        (HidesAWeight, "a fresh model that loads the state dict must give the same embeddings"),
        (GrowsAtRandom, "a fresh model must load the state dict: .*size mismatch"),
        (SeedsItself, "the same seed must give the same initial weights"),
        (CopiesNothing, "a copy must give the same embeddings"),
        (lambda: Network().requires_grad_(False), "estimate_importance must work for the model: .*trainable"),
        (IsConstant, "must depend on some trainable parameter"),
        (Detaches, "in train mode the embeddings must be differentiable"),
        (StopsInTraining, "in train mode some gradient must not be zero"),
        (ForgetsTheBias, r"parameter_groups\(lr\) must hold every trainable parameter once"),
        (RefusesTensors, "must embed a batch of inputs"),
    ],
)
def test_a_broken_model_is_reported(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_model(broken, POINTS)


def test_one_input_is_not_enough():
    with pytest.raises(AssertionError, match="at least two inputs"):
        check_model(Network, POINTS[:1])
