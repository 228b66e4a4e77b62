"""The multi-head network: scores side by side, and heads of other splits that stay as they are."""

from functools import partial

import pytest
import torch
from small_recognition import CLASSES, learn, small_net, small_splits
from torch import nn

from mas_embed import EWC, MAS, SI, ClassStatistics, Frozen, LocalMAS, Replay, UserError, estimate_importance
from mas_embed.models import MODELS, preprocessing_of
from mas_embed.recognition import MultiHeadCrossEntropy, MultiHeadLwF, MultiHeadNet, multi_head

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)
OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "SGD": SGD,
    "Nesterov": partial(SGD, nesterov=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, weight_decay=0.1, momentum=0.9),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1, weight_decay=0.1),
}


def heads_of(model):
    return [torch.cat([value.flatten() for value in head.parameters()]).detach().clone() for head in model.head]


class HeadsAfterSplits:
    """A method's class whose objects record the heads when the model is made and when each split ends."""

    def __init__(self, make):
        self.make, self.seen = make, []

    def __call__(self, model):
        method, self.seen = self.make(model), [heads_of(model)]
        consolidate = method.consolidate

        def recorded(batches):
            result = consolidate(batches)
            self.seen.append(heads_of(model))
            return result

        method.consolidate = recorded
        return method


METHODS = {
    "mas": partial(MAS, strength=1.0, embed="features"),
    "mas decoupled": partial(MAS, strength=1.0, embed="features", decoupled=True),
    "local_mas": partial(LocalMAS, embed="features"),
    "ewc": partial(EWC, strength=1.0, loss=MultiHeadCrossEntropy(CLASSES)),
    "si": partial(SI, strength=1.0),
    "frozen": partial(Frozen, only="trunk"),
}


@pytest.mark.parametrize(
    ("make", "optimizer"),
    [
        *((make, OPTIMIZERS["SGD"]) for make in METHODS.values()),
        *((METHODS["mas"], one) for one in OPTIMIZERS.values()),
    ],
    ids=[*METHODS, *OPTIMIZERS],
)
def test_the_heads_of_other_splits_stay_as_they_are_to_the_bit(make, optimizer):
    recorder = HeadsAfterSplits(make)
    learn(recorder, optimizer=optimizer, epochs=2)
    for split_index in range(len(CLASSES)):
        before, after = recorder.seen[split_index : split_index + 2]
        for head_index, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new) == (head_index != split_index)


@pytest.mark.parametrize("make", [Replay, partial(MultiHeadLwF, classes_per_split=CLASSES)], ids=["replay", "lwf"])
def test_methods_that_train_the_old_heads_move_them_but_not_those_to_come(make):
    recorder = HeadsAfterSplits(make)
    learn(recorder, optimizer=SGD, epochs=2)
    first, second = recorder.seen[1:3]
    assert [torch.equal(old, new) for old, new in zip(first, second, strict=True)] == [False, False, True]


def test_importance_of_the_features_is_that_of_the_trunk_alone_without_labels():
    model, images = small_net(), small_splits()[0].train.inputs
    importance = estimate_importance(model, images.split(5), embed="features")
    of_trunk = estimate_importance(model.trunk, images.split(5))
    for name, values in of_trunk.items():
        torch.testing.assert_close(importance[f"trunk.{name}"], values, rtol=1e-6, atol=0)
        assert values.sum() > 0
    assert all(not values.any() for name, values in importance.items() if name.startswith("head."))


def test_a_frozen_trunk_is_that_of_the_first_split():
    splits = small_splits()
    first, _ = learn(partial(Frozen, only="trunk"), splits=splits[:1])
    model, result = learn(partial(Frozen, only="trunk"), splits=splits)
    assert torch.equal(first.trunk[0].weight, model.trunk[0].weight)
    accuracy = result.scores["accuracy"]
    assert accuracy.forgetting == accuracy.backward_transfer == 0
    assert accuracy.learning > 0.8  # the new heads do learn


def test_drawn_features_of_old_classes_pass_through_the_heads():
    _, result = learn(partial(ClassStatistics, layer="trunk"))
    assert result.scores["accuracy"].final_average > 0.8
    assert result.scores["accuracy_all_heads"].final_average > 0


def test_mas_forgets_less_than_finetuning():
    from mas_embed import Finetune

    results = {}
    for name, make in {"finetune": Finetune, "mas": partial(MAS, strength=3.0, embed="features")}.items():
        runs = [
            learn(make, model=small_net(seed, hidden=4), splits=small_splits(seed=seed, noise=0.6))[1]
            for seed in range(4)
        ]
        results[name] = sum(run.scores["accuracy"].forgetting for run in runs) / len(runs)
    assert results["mas"] < 0.7 * results["finetune"]


def test_scores_are_those_of_the_heads_side_by_side_and_importance_needs_no_head():
    model = small_net()
    inputs = torch.randn(5, 4)
    features = model.features(inputs)
    assert torch.equal(features, model.trunk(inputs))
    assert torch.equal(model(inputs), torch.cat([head(features) for head in model.head], 1))
    assert model(inputs).shape == (5, sum(CLASSES))


@pytest.mark.parametrize(
    ("trunk", "num_features", "size"),
    [
        ({"name": "small_conv", "channels": 3, "width": 2}, 8, 8),
        ({"name": "backbone", "network": "cifar_resnet20", "weights": "none"}, 64, 32),
        ({"name": "backbone", "network": "cifar_resnet20", "weights": "none", "head": "mlp"}, 64, 32),
    ],
)
def test_trunks(trunk, num_features, size):
    model = multi_head(trunk=trunk, classes_per_split=[2, 3])
    images = torch.rand(2, 3, size, size)
    assert model.features(images).shape == (2, num_features)
    assert model(images).shape == (2, 5)
    assert all(parameter.shape[0] in (2, 3) for parameter in model.head.parameters())


def test_the_options_of_a_backbone_hold():
    trunk = {"name": "backbone", "network": "cifar_resnet20", "weights": "none", "trunk_learning_rate": 0.1}
    model = multi_head(trunk=trunk | {"frozen_up_to": "layer1", "frozen_batch_norm": True}, classes_per_split=[2])
    of_trunk, of_heads = model.parameter_groups(1.0)
    assert (of_trunk["lr"], of_heads["lr"], of_heads["weight_decay"]) == (0.1, 1.0, 0.0)
    assert "weight_decay" not in of_trunk
    assert not model.trunk.conv1.weight.requires_grad and model.trunk.layer2[0].conv1.weight.requires_grad
    assert not model.train().trunk.bn1.training
    assert len(of_trunk["params"]) + len(of_heads["params"]) == sum(p.requires_grad for p in model.parameters())


def test_a_trunk_whose_parameters_are_all_frozen_leaves_the_heads():
    model = small_net()
    model.trunk.requires_grad_(False)
    (group,) = model.parameter_groups(0.1)
    assert group["weight_decay"] == 0 and len(group["params"]) == 6


@pytest.mark.parametrize(
    ("trunk", "message"),
    [
        ({"width": 3}, r"trunk needs a name, as in trunk: \{name: small_conv, channels: 3\}, got \{'width': 3\}"),
        ("small_cnov", "unknown model 'small_cnov': did you mean 'small_conv'"),
        ({"name": "small_conv", "colours": 3}, "trunk: .*unexpected keyword argument 'colours'"),
        ({"name": "small_conv", "width": 0}, "width must be a whole number >= 1, got 0"),
        ("no_trunk", "the trunk must be an embedding network with a trunk and a head, such as backbone, not no_trunk"),
    ],
)
def test_trunks_that_cannot_be_built_are_refused(trunk, message, monkeypatch):
    monkeypatch.setitem(MODELS._components, "no_trunk", lambda: nn.Linear(2, 2))
    with pytest.raises(UserError, match=message):
        multi_head(trunk=trunk, classes_per_split=[2])


def test_a_model_is_a_multi_head_net():
    assert isinstance(multi_head(trunk="small_conv", classes_per_split=[1, 2]), MultiHeadNet)


def test_the_colours_are_those_that_the_weights_of_the_trunk_want():
    trunk = {"name": "backbone", "network": "resnet18", "weights": "default"}
    assert preprocessing_of("multi_head", {"trunk": trunk}) == preprocessing_of("backbone", trunk)
    for other in ({**trunk, "weights": "none"}, "small_conv", {"name": "nothing"}, {}):
        assert preprocessing_of("multi_head", {"trunk": other}) is None


def test_a_trunk_without_a_head_is_refused():
    with pytest.raises(UserError, match="leave out the trunk's option head"):
        multi_head(
            trunk={"name": "backbone", "network": "cifar_resnet20", "weights": "none", "head": "none"},
            classes_per_split=[2],
        )
