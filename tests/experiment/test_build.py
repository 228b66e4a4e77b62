"""Components of every kind from outside the package, through a config: what another package would bring."""

import json

import pytest
import torch
from tiny_experiment import TINY, load_from
from torch import nn

from mas_embed import (
    CALLBACKS,
    DATASETS,
    EVALUATORS,
    LOSSES,
    METHODS,
    MODELS,
    SAMPLERS,
    Callback,
    Evaluation,
    Method,
    Part,
    Split,
    SplitSequence,
    UserError,
    load_config,
    run_experiment,
)
from mas_embed.experiment import build_splits, build_training, dry_run
from mas_embed.models import PREPROCESSING
from mas_embed.runtime.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("blank_pictures")


@DATASETS.register("towns", provides=["num_towns"])
def towns(*, size: int = 12, held_out: str = "test"):
    """Two splits of two classes of points; the data set knows how many towns there are, and their names."""
    generator = torch.Generator().manual_seed(0 if held_out == "test" else 1)

    def part(first, count):
        labels = torch.arange(first, first + 2).repeat(count // 2)
        return Part(labels[:, None] + torch.randn(count, 3, generator=generator), labels)

    splits = []
    for index in range(2):
        held = part(2 * index, size)
        splits.append(Split(f"s{index}", part(2 * index, size), held, held))
    return SplitSequence(splits, label_names={"Oslo": [0], "Rome": [1, 2]}, provides={"num_towns": 4})


@MODELS.register("town_net")
class TownNet(nn.Module):
    def __init__(self, *, embedding_size: int = 2, num_towns: int = 0):
        super().__init__()
        self.layer, self.num_towns = nn.Linear(3, embedding_size), num_towns

    def forward(self, inputs):
        return self.layer(inputs)


@LOSSES.register("to_town")
class ToTown(nn.Module):
    def __init__(self, *, num_towns: int, num_classes: int, embedding_size: int, weight: float = 1.0):
        super().__init__()
        assert (num_towns, num_classes) == (4, 4)
        self.towns, self.weight = nn.Parameter(torch.randn(num_classes, embedding_size)), weight

    def forward(self, embeddings, labels, mined=None):
        return self.weight * (embeddings - self.towns[labels]).square().mean()


@METHODS.register("stay_home")
class StayHome(Method):
    def __init__(self, model, *, num_towns: int, splits, loss, strength: float = 1.0):
        super().__init__(model)
        assert num_towns == 4 and len(splits) == 2 and isinstance(loss, ToTown)
        self.strength = strength


@EVALUATORS.register("mean_length")
class MeanLength:
    """By the four methods of the contract alone, without a base class."""

    def __init__(self, num_towns, *, power: float = 1.0):
        assert num_towns == 4
        self.power = power

    def begin_split(self, model, splits, split_index):
        pass

    def evaluate(self, model, splits, split_index):
        with torch.no_grad():
            values = [float(model(split.query.inputs).norm(dim=1).mean()) ** self.power for split in splits]
        return Evaluation({"length": values}, {"length": sum(values)})

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@SAMPLERS.register("in_order")
def in_order(labels, *, reverse: bool = False):
    return list(reversed(range(len(labels)))) if reverse else list(range(len(labels)))


@CALLBACKS.register("count_splits")
class CountSplits(Callback):
    def __init__(self, folder, *, name: str = "count"):
        self._path, self._count = folder / f"{name}.json", 0

    def on_split_end(self, event):
        self._count += 1
        self._path.write_text(json.dumps([self._count, event.method, event.evaluation.scores]))


TOWNS = {
    "name": "towns", "data": "towns", "model": "town_net", "loss": "to_town", "methods": ["stay_home", "finetune"],
    "training": {"epochs": 1, "batch_size": 8, "sampler": {"name": "in_order", "reverse": True}},
    "evaluation": {"name": "mean_length", "primary_metric": "length", "power": 2}, "callbacks": ["count_splits"],
}  # fmt: skip


def test_a_component_of_each_kind_comes_in_by_its_name(tmp_path):
    results = run_experiment(load_from(tmp_path, TOWNS), tmp_path / "run")
    assert results.methods == ["stay_home", "finetune"]
    assert results.runs[0].scores == results.runs[1].scores
    assert json.loads((tmp_path / "run/stay_home/seed0/count.json").read_text()) == [
        2, "stay_home", {"length": results.runs[0].scores["length"][1]},
    ]  # fmt: skip
    assert (tmp_path / "run" / "report.html").exists()


def test_the_data_set_fills_options_in_and_a_stated_one_must_agree(tmp_path):
    config = load_from(tmp_path, TOWNS)
    assert "num_towns" not in config.model.options
    assert build_training(config, config.methods[0], build_splits(config), seed=0).model.num_towns == 4
    dry_run(
        stated := load_from(tmp_path, TOWNS | {"model": {"name": "town_net", "num_towns": 4}}), build_splits(stated)
    )
    wrong = load_from(tmp_path, TOWNS | {"model": {"name": "town_net", "num_towns": 5}})
    with pytest.raises(UserError, match="model: num_towns is 5 in the config, but 4 in this run; leave it out"):
        dry_run(wrong, build_splits(wrong))
    with pytest.raises(UserError, match="loss needs 'num_towns', which this data set does not provide; .* does: towns"):
        load_from(tmp_path, TINY | {"loss": "to_town"})


def test_items_are_selected_by_the_names_of_their_labels(tmp_path):
    subsets = {"south": {"labels": ["Rome"]}}
    config = load_from(tmp_path, TOWNS | {"subsets": subsets, "importance": {"data": "south"}})
    training = build_training(config, config.methods[0], build_splits(config), seed=0)
    assert len(training.importance_data) == 12
    with pytest.raises(UserError, match=r"subsets.south: unknown label 'Roma': did you mean 'Rome'\?"):
        wrong = load_from(
            tmp_path, TOWNS | {"subsets": {"south": {"labels": ["Roma"]}}, "importance": {"data": "south"}}
        )
        dry_run(wrong, build_splits(wrong))


def test_the_metric_of_an_evaluator_that_cannot_tell_is_found_by_trying(tmp_path):
    evaluation = {"name": "mean_length", "primary_metric": "lenght"}
    config = load_from(tmp_path, TOWNS | {"evaluation": evaluation})
    with pytest.raises(UserError, match="unknown evaluation.primary_metric 'lenght': did you mean 'length'"):
        dry_run(config, build_splits(config))


def test_building_draws_from_the_seed_alone(tmp_path):
    config = load_from(tmp_path, TOWNS)
    splits = build_splits(config)
    one, two, other = (build_training(config, config.methods[0], splits, seed=seed) for seed in (3, 3, 4))
    for first, second, third in zip(one.loss.parameters(), two.loss.parameters(), other.loss.parameters(), strict=True):
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_the_dry_run_leaves_the_random_state_alone_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_from(tmp_path, TOWNS)
    state, files = torch.get_rng_state(), sorted(tmp_path.rglob("*"))
    dry_run(config, build_splits(config))
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(tmp_path.rglob("*")) == files


@PREPROCESSING.register("town_pictures")
def town_colours(*, weights: str = "none"):
    return Preprocessing((0.5,), (0.25,)) if weights != "none" else None


@MODELS.register("town_pictures")
def town_pictures(*, weights: str = "none"):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def with_transforms(tmp_path, model="small_conv", **transforms):
    return load_from(tmp_path, {**TINY, "model": model, "transforms": transforms})


def test_transforms_have_their_defaults_in_the_resolved_config(tmp_path):
    assert load_from(tmp_path, TINY).transforms.model_dump() == {"augment": (), "normalize": "none"}
    augment = [{"name": "RandomResizedCrop", "scale": [0.5, 1]}, "RandomHorizontalFlip"]
    resolved = with_transforms(tmp_path, augment=augment, normalize="data").to_yaml()
    assert "scale: [0.5, 1.0]" in resolved and "p: 0.5" in resolved and "normalize: data" in resolved
    (tmp_path / "again.yaml").write_text(resolved)
    again = load_config(tmp_path / "again.yaml")
    assert again.to_yaml() == resolved
    splits = build_splits(again)
    assert splits[0].train.augmented[0].shape == (1, 8, 8)
    assert splits[0].query.augmented is None


def test_the_model_says_which_colours_its_weights_want(tmp_path):
    with_weights = {"name": "town_pictures", "weights": "default"}
    assert with_transforms(tmp_path, with_weights).transforms.normalize == "weights"
    assert with_transforms(tmp_path, "town_pictures").transforms.normalize == "none"
    assert with_transforms(tmp_path, with_weights, normalize="none").transforms.normalize == "none"
    plain = build_splits(with_transforms(tmp_path))[0].train.inputs
    wanted = build_splits(with_transforms(tmp_path, with_weights))[0].train.inputs
    assert torch.equal(wanted, (plain - 0.5) / 0.25)
    with pytest.raises(UserError, match="normalize=weights needs a model with weights that ask for colours"):
        with_transforms(tmp_path, "town_pictures", normalize="weights")


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"augment": ["RandomFlip"]}, "unknown transform 'RandomFlip': did you mean"),
        ({"augment": [{"name": "RandomRotation", "degree": 3}]}, "option of transforms.augment.RandomRotation 'degree'"),
        ({"augment": [{"name": "RandomCrop", "size": 4}]}, r"transforms.augment.RandomCrop: size is 4 in the config, but \[8, 8\]"),
        ({"augment": ["Grayscale", "RandomShortestSize"]}, "transforms.augment.RandomShortestSize needs the option"),
        ({"normalize": "imagenet"}, "transforms.normalize=.* must be 'weights', 'data' or 'none'"),
        ({"augment": [{"name": "Pad", "padding": 1}]}, r"transforms: augmented images must have the shape \[1, 8, 8\]"),
    ],
)  # fmt: skip
def test_transforms_that_do_not_fit_name_their_key(tmp_path, transforms, message):
    with pytest.raises(UserError, match=message):
        build_splits(with_transforms(tmp_path, **transforms))


def test_a_run_with_augmentation(tmp_path):
    transforms = {"augment": ["RandomHorizontalFlip"], "normalize": "data"}
    config = load_from(tmp_path, {**TINY, "seeds": [0], "methods": ["replay", "joint"], "transforms": transforms})
    results = run_experiment(config, tmp_path / "run")
    assert len(results.runs) == 2
