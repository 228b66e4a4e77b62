"""Object recognition as a config describes it, small."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_experiment  # registers few_digits
import yaml
from small import Recorder, Stopped

from mas_embed import UserError, load_config, read_results, run_experiment
from mas_embed.experiment import build_model, build_splits
from mas_embed.recognition import RECOGNITION_METRICS
from mas_embed.training import SplitEnd

pytestmark = pytest.mark.usefixtures("blank_pictures")

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = {
    "name": "tiny_recognition",
    "data": {
        "name": "recognition",
        "sets": [
            {"name": "few_digits", "num_splits": 2, "join": False},
            {"name": "few_digits", "num_splits": 5, "title": "all"},
        ],
        "image_size": 8,
    },
    "model": {"name": "multi_head", "trunk": {"name": "small_conv", "channels": 3, "width": 2}},
    "loss": "multi_head_cross_entropy",
    "methods": [
        "finetune",
        {"name": "frozen", "only": "trunk"},
        {"name": "mas", "embed": "features", "strength": 3},
        {"name": "mas", "label": "mas on all", "embed": "features", "strength": 3, "importance": {"data": "all"}},
        {"name": "local_mas", "embed": "features"},
        "ewc",
        "si",
        {"name": "multi_head_lwf", "temperature": 1},
        {"name": "class_statistics", "layer": "trunk"},
        {"name": "replay", "buffer_size": 9},
        "joint",
    ],
    "subsets": {"all": {"split": "all", "part": "query"}},
    "training": {"epochs": 2, "batch_size": 32, "optimizer": {"lr": 0.02}},
    "evaluation": {"name": "recognition", "primary_metric": "accuracy", "by_class": True},
}


@pytest.fixture
def load(tmp_path):
    return lambda **changes: tiny_experiment.load_from(tmp_path, TINY | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recognition")
    run_experiment(tiny_experiment.load_from(folder, TINY), folder / "run")
    return folder / "run"


def test_every_method_gives_both_accuracies_of_every_split(finished):
    results = read_results(finished)
    assert results.splits == ["0-4", "5-9", "all"]
    assert results.methods == [
        one if isinstance(one, str) else one.get("label", one["name"]) for one in TINY["methods"]
    ]
    for run in results.runs:
        num_rows = 1 if run.method == "joint" else 3
        assert tuple(run.scores) == tuple(run.pooled) == RECOGNITION_METRICS
        assert all(np.shape(matrix) == (num_rows, 3) for matrix in run.scores.values())
        assert np.all(np.array(run.scores["accuracy"]) >= run.scores["accuracy_all_heads"])
        by_class = [found.class_accuracy for found in run.details]
        assert [list(one) for one in by_class] == [results.splits] * num_rows
        assert list(by_class[-1]["5-9"]) == ["5", "6", "7", "8", "9"]


def test_methods_protect_differently_and_from_unlabeled_images(finished):
    final = {run.method: run.scores["accuracy"][-1] for run in read_results(finished).runs}
    names = ["finetune", "frozen", "mas", "multi_head_lwf", "class_statistics", "replay"]
    assert len({tuple(final[name]) for name in names}) >= 5
    (frozen,) = read_results(finished).runs_of("frozen")
    assert frozen.measures["accuracy"]["forgetting"] == 0
    assert read_results(finished).runs_of("mas on all")[0].importance_data == "all"


def test_the_report_shows_the_accuracy(finished):
    page = (finished / "report.html").read_text()
    assert "accuracy of every split in the end, and of all together" in page
    assert "accuracy all heads" in page


def is_end_of_second_split(method, event):
    return isinstance(event, SplitEnd) and (event.method, event.split_index) == (method, 1)


def test_a_resumed_run_equals_an_uninterrupted_one(load, tmp_path):
    methods = [{"name": "multi_head_lwf"}, {"name": "frozen", "only": "trunk"}, "replay"]
    expected = run_experiment(load(methods=methods), tmp_path / "whole")
    for index, method in enumerate(("multi_head_lwf", "frozen")):
        stop = Recorder(partial(is_end_of_second_split, method))
        with pytest.raises(Stopped):
            run_experiment(load(methods=methods), tmp_path / "run", callbacks=[stop], resume=index > 0)
    resumed = run_experiment(load(methods=methods), tmp_path / "run", resume=True)
    for run, whole in zip(resumed.runs, expected.runs, strict=True):
        assert (run.method, run.scores, run.pooled, run.details) == (
            whole.method,
            whole.scores,
            whole.pooled,
            whole.details,
        )


def test_strengths_are_selected_on_the_validation_part(load, tmp_path):
    select = {"strength": [1, 10], "seeds": [7], "num_splits": 2}
    results = run_experiment(load(methods=[{"name": "multi_head_lwf", "select": select}]), tmp_path / "run")
    assert [one.error for one in results.selections["multi_head_lwf"].candidates] == [None, None]


def test_the_resolved_config_can_be_read_again(load, tmp_path):
    config = load()
    assert "classes_per_split" not in {*config.model.options, *config.loss.options, *config.evaluation.options}
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_numbers_of_classes_are_those_of_the_data(load):
    splits = build_splits(load())
    assert [head.out_features for head in build_model(load(), splits, seed=0).head] == [5, 5, 10]
    stated = load(model=TINY["model"] | {"classes_per_split": [5, 5]})
    with pytest.raises(UserError, match=r"classes_per_split is \[5, 5\] in the config, but \[5, 5, 10\] in this run"):
        build_model(stated, splits, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": TINY["data"] | {"sets": ["few_digist"]}}, "^data: sets.0: unknown data set 'few_digist': did you mean"),
        ({"model": {"name": "small_conv", "embedding_size": 4, "channels": 3, "width": 2}, "methods": ["finetune"]},
         r"loss.*20 classes, so class scores must have shape \[N, 20\], got \[\d+, 4\]; take the model multi_head"),
        ({"methods": [{"name": "frozen", "only": "trunks"}]}, "methods.frozen: unknown module of the model 'trunks'"),
        ({"evaluation": {"name": "recognition"}}, "unknown evaluation.primary_metric 'mean_average_precision'"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_trained_writes_nothing(load, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_experiment(load(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_components_need_data_with_classes_per_split(load):
    with pytest.raises(
        UserError, match="^model needs 'classes_per_split', which this data set does not provide; .*: recognition"
    ):
        load(data={"name": "digits"}, subsets={}, methods=["finetune"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("recognition*.yaml")), ids=lambda path: path.stem)
def test_the_configs_load(path):
    config = load_config(path)
    assert (config.model.name, config.loss.name) == ("multi_head", "multi_head_cross_entropy")
    assert yaml.safe_load(path.read_text())["evaluation"] == {"name": "recognition", "primary_metric": "accuracy"}


def test_the_config_of_the_digits_runs(tmp_path):
    config = load_config(
        CONFIGS / "recognition_digits.yaml",
        ["seeds=[0]", "training.epochs=1", "model.trunk.width=2", "methods=[{name: mas, embed: features}]"],
    )
    assert run_experiment(config, tmp_path / "run").splits == ["0-1", "2-3", "4-5", "6-7", "8-9"]
