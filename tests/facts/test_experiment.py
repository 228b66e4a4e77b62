"""The fact experiment as a config describes it, small."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from small import Recorder, Stopped
from small_release import write_release

from mas_embed import UserError, load_config, read_results, run_experiment
from mas_embed.experiment import build_model, build_splits
from mas_embed.facts import FACT_METRICS
from mas_embed.training import SplitEnd

pytestmark = pytest.mark.usefixtures("blank_pictures")

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = {
    "name": "tiny_facts",
    "data": {"name": "fact_digits", "num_splits": 2, "train_images": 2, "held_out_images": 2, "image_size": 28},
    "model": {"name": "small_fact_conv", "width": 2, "hidden": 8},
    "loss": "facts",
    "methods": [
        "finetune",
        {"name": "mas", "strength": 3},
        {"name": "mas", "label": "mas threes", "strength": 3, "importance": {"data": "threes"}},
        "joint",
    ],
    "subsets": {"threes": {"labels": ["<three>", "<three, large>"]}},
    "training": {"epochs": 1, "batch_size": 64},
    "evaluation": {"name": "facts", "track": ["threes"]},
}


def load_from(folder, values):
    """The config with these values, read from a file in the folder."""
    path = folder / "config_given.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


@pytest.fixture
def load(tmp_path):
    return lambda **changes: load_from(tmp_path, TINY | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    run_experiment(load_from(folder, TINY), folder / "run")
    return folder / "run"


def runs_in(folder):
    return {run.method: run for run in read_results(folder).runs}


def test_every_metric_of_every_split_and_pooled(finished):
    runs = runs_in(finished)
    assert list(runs) == ["finetune", "mas", "mas threes", "joint"]
    for name, run in runs.items():
        num_rows = 1 if name == "joint" else 2
        assert run.scores.keys() >= set(FACT_METRICS)
        assert all(np.shape(matrix) == (num_rows, 2) for matrix in run.scores.values())
        assert run.pooled.keys() >= {*FACT_METRICS, *(f"mean_average_precision_order_{order}" for order in (1, 2, 3))}
        assert [details.tracked.keys() for details in run.details] == [{"threes"}] * num_rows
        assert all(details.stale_gallery is details.index_update is None for details in run.details)


def test_importance_is_estimated_on_the_data_that_the_method_names(finished):
    runs = runs_in(finished)
    assert {name: run.importance_data for name, run in runs.items()} == {
        "finetune": "train", "mas": "train", "mas threes": "threes", "joint": "train",
    }  # fmt: skip
    first, second = (
        {name: run.scores["mean_average_precision"][row] for name, run in runs.items() if name != "joint"}
        for row in (0, 1)
    )
    assert first["finetune"] == first["mas"] == first["mas threes"]  # nothing to protect yet
    assert len({tuple(row) for row in second.values()}) == 3


def test_the_report_shows_every_split_and_the_tracked_subset(finished):
    page = (finished / "report.html").read_text()
    assert "mAP of every split in the end, and of all together" in page
    assert "tiny_facts: mAP of &#39;threes&#39; after every split" in page
    assert "mAP order 3" in page
    assert not (finished / "stale_gallery.png").exists()


def test_a_resumed_run_equals_an_uninterrupted_one(finished, load, tmp_path):
    in_second_mas = Recorder(lambda event: isinstance(event, SplitEnd) and event.method == "mas threes")
    with pytest.raises(Stopped):
        run_experiment(load(), tmp_path / "run", callbacks=[in_second_mas])
    resumed = run_experiment(load(), tmp_path / "run", resume=True)
    for run, expected in zip(resumed.runs, read_results(finished).runs, strict=True):
        for key in ("method", "scores", "pooled", "details"):
            assert getattr(run, key) == getattr(expected, key)


def test_the_importance_of_a_config_is_that_of_every_method_that_names_none(finished, load, tmp_path):
    config = load(
        importance={"data": "threes"},
        methods=[
            {"name": "mas", "strength": 3},
            {"name": "mas", "label": "on all", "strength": 3, "importance": {"data": "train"}},
        ],
    )
    scores = [run.scores for run in run_experiment(config, tmp_path / "run").runs]
    expected = runs_in(finished)
    assert scores == [expected["mas threes"].scores, expected["mas"].scores]


def test_options_are_selected_on_the_validation_part_of_facts(load, tmp_path):
    select = {"strength": [1, 10], "seeds": [7], "num_splits": 1}
    config = load(methods=[{"name": "mas", "importance": {"data": "threes"}, "select": select}])
    results = run_experiment(config, tmp_path / "run")
    selection = results.selections["mas"]
    assert [candidate.error for candidate in selection.candidates] == [None, None]
    (run,) = results.runs
    assert run.options["strength"] == selection.chosen["strength"]
    assert run.importance_data == "threes"
    assert run.num_steps > 0 and run.keeps == "nothing"
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_size_of_a_word_vector_is_that_of_the_data(load):
    config = load()
    assert "vector_size" not in config.model.options
    splits = build_splits(config)
    assert build_model(config, splits, seed=0).subject.last.out_features == splits.facts.vectors.shape[2] == 24
    stated = load(model=TINY["model"] | {"vector_size": 24})
    assert build_model(stated, splits, seed=0).subject.last.out_features == 24
    other = load(model=TINY["model"] | {"vector_size": 300})
    with pytest.raises(UserError, match="model: vector_size is 300 in the config, but 24 in this run; leave it out"):
        build_model(other, splits, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "^loss needs 'facts', which this data set does not provide; take one that does: "),
        ({"loss": "TripletMarginLoss"}, "^evaluation needs 'facts', which this data set does not provide; take one "),
    ],
)
def test_components_that_need_facts_are_refused_on_data_without(load, changes, message):
    changes = {"data": {"name": "digits"}, "model": "small_conv", "subsets": {}, "methods": ["mas"], **changes}
    with pytest.raises(UserError, match=message) as raised:
        load(evaluation="facts", **changes)
    assert str(raised.value).rpartition(": ")[2].split(", ") == ["fact_digits", "fact_list", "facts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"subsets": {"threes": {"labels": ["<trhee>"]}}},
            r"subsets.threes: unknown label '<trhee>': did you mean '<three>'\?",
        ),
        ({"subsets": {"threes": {"split": 9}}}, "subsets.threes: unknown split '9'"),
        ({"methods": [{"name": "ewc", "importance": {"data": "threes"}}]}, "methods.ewc.*labels"),
        (
            {"model": TINY["model"] | {"vector_size": 300}},
            "model: vector_size is 300 in the config, but 24 in this run",
        ),
    ],
)
def test_a_config_that_cannot_be_trained_writes_nothing(load, tmp_path, changes, message):
    config = load(**changes)
    with pytest.raises(UserError, match=message):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("facts_*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_fact_experiments_load(path):
    config = load_config(path, [] if "fact_digits" in path.read_text() else ["data.root=x"])
    assert config.evaluation.name == config.loss.name == "facts"


def test_the_papers_settings_on_a_folder_of_the_release(tmp_path):
    """All but the size of the images and of the network, which would take minutes."""
    root = write_release(tmp_path / "6ds")
    config = load_config(
        CONFIGS / "facts_6ds.yaml",
        [
            f"data.root={root}",
            "data.split_name=2tasks_random",
            "data.image_size=32",
            "data.short_side=32",
            "model={name: two_branch, trunk: resnet18}",
            "training.batch_size=3",
        ],
    )
    splits = build_splits(config)
    assert [split.name for split in splits] == ["B1", "B2"]
    assert config.training.optimizer.options.items() >= {"lr": 5e-5, "momentum": 0.9, "weight_decay": 5e-4}.items()
    assert config.training.scheduler.options.items() >= {"step_size": 250, "gamma": 0.1}.items()
    assert (load_config(CONFIGS / "facts_6ds.yaml", ["data.root=x"])).model.options == {
        "form": "model_2",
        "weights": "default",
    }
