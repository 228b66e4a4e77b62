"""The fact experiment through the command line's functions, small."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_release import write_release
from test_experiment import load_from

from mas_embed import UserError, load_config, run_experiment
from mas_embed.experiment.runner import make_model, make_splits
from mas_embed.training import FACT_METRICS

CONFIGS = Path(__file__).parent.parent / "configs"

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
    "evaluation": {"name": "facts", "follow": ["threes"]},
}


@pytest.fixture
def load(tmp_path):
    return lambda **changes: load_from(tmp_path, TINY | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    run_experiment(load_from(folder, TINY), folder / "run")
    return folder / "run"


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_metric_of_every_split_and_of_all(finished):
    results = results_in(finished)
    assert [run["method"] for run in results["runs"]] == ["finetune", "mas", "mas threes", "joint"]
    for run in results["runs"]:
        num_rows = 1 if run["method"] == "joint" else 2
        assert run["scores"].keys() >= set(FACT_METRICS)
        assert all(np.shape(matrix) == (num_rows, 2) for matrix in run["scores"].values())
        assert run["all"].keys() >= {*FACT_METRICS, *(f"mean_average_precision_order_{order}" for order in (1, 2, 3))}
        assert len(run["followed"]["threes"]) == num_rows
        assert run["kept_gallery"]["scores"] == {}


def test_importance_follows_the_data_that_the_method_names(finished):
    runs = {run["method"]: run for run in results_in(finished)["runs"]}
    assert {name: run["importance_data"] for name, run in runs.items()} == {
        "finetune": "train", "mas": "train", "mas threes": "threes", "joint": "train",
    }  # fmt: skip
    first, second = (
        {name: run["scores"]["mean_average_precision"][row] for name, run in runs.items() if name != "joint"}
        for row in (0, 1)
    )
    assert first["finetune"] == first["mas"] == first["mas threes"]  # nothing to protect yet
    assert len({tuple(row) for row in second.values()}) == 3


def test_the_report_has_the_papers_table_and_what_was_followed(finished):
    page = (finished / "report.html").read_text()
    assert "tiny_facts: mAP of every split in the end, and of all together" in page
    assert "tiny_facts: mAP of &#39;threes&#39; after every split" in page
    assert "mAP order 3" in page
    assert not (finished / "old_index.png").exists()


def test_resumed_is_uninterrupted(finished, load, tmp_path):
    def stop(event):
        if (event["event"], event["method"]) == ("split", "mas threes"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(load(), tmp_path / "run", on_event=stop)
    resumed = run_experiment(load(), tmp_path / "run", resume=True)
    for run, expected in zip(resumed["runs"], results_in(finished)["runs"], strict=True):
        for key in ("method", "scores", "all", "followed"):
            assert run[key] == expected[key]


def test_the_importance_of_a_config_is_that_of_every_method_that_names_none(finished, load, tmp_path):
    config = load(
        importance={"data": "threes"},
        methods=[{"name": "mas", "strength": 3}, {"name": "mas", "label": "own", "strength": 3, "importance": {"data": "train"}}],
    )  # fmt: skip
    scores = [run["scores"] for run in run_experiment(config, tmp_path / "run")["runs"]]
    expected = {run["method"]: run["scores"] for run in results_in(finished)["runs"]}
    assert scores == [expected["mas threes"], expected["mas"]]


def test_options_are_selected_on_the_validation_part_of_facts(load, tmp_path):
    select = {"strength": [1, 10], "seeds": [7], "num_splits": 1}
    method = {"name": "mas", "importance": {"data": "threes"}, "select": select}
    config = load(methods=[method])
    results = run_experiment(config, tmp_path / "run")
    tried = results["selections"]["mas"]["candidates"]
    assert [candidate["error"] for candidate in tried] == [None, None]
    (run,) = results["runs"]
    assert run["options"]["strength"] == results["selections"]["mas"]["chosen"]["strength"]
    assert run["importance_data"] == "threes"
    assert run["num_steps"] > 0 and run["keeps"] == "nothing"
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_size_of_a_word_vector_is_that_of_the_data(load):
    config = load()
    assert "vector_size" not in config.model.options
    splits = make_splits(config)
    assert make_model(config, splits, seed=0).subject.last.out_features == splits.facts.vectors.shape[2] == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"name": "digits"}},
            "loss: it needs data with facts, such as fact_digits, facts or fact_list; this data has none",
        ),
        (
            {
                "data": {"name": "digits"},
                "loss": "TripletMarginLoss",
                "subsets": {},
                "methods": ["mas"],
                "evaluation": "facts",
            },
            "evaluation: it needs data with facts",
        ),
        (
            {"subsets": {"threes": {"labels": ["<trhee>"]}}},
            r"subsets.threes: unknown fact '<trhee>': did you mean '<three>'\?",
        ),
        ({"subsets": {"threes": {"split": 9}}}, "subsets.threes: unknown split '9'"),
        ({"methods": [{"name": "ewc", "importance": {"data": "threes"}}]}, "methods.ewc.*labels"),
    ],
)
def test_a_config_that_cannot_be_trained_writes_nothing(load, tmp_path, changes, message):
    config = load(**changes)
    with pytest.raises(UserError, match=message):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    splits = make_splits(config)
    assert [split.name for split in splits] == ["B1", "B2"]
    assert config.training.optimizer.options.items() >= {"lr": 5e-5, "momentum": 0.9, "weight_decay": 5e-4}.items()
    assert config.training.scheduler.options.items() >= {"step_size": 250, "gamma": 0.1}.items()
    assert (load_config(CONFIGS / "facts_6ds.yaml", ["data.root=x"])).model.options == {
        "form": "model_2",
        "weights": "default",
    }
