"""Splits that are appended to the config of a run."""

import json
import math
import shutil

import pytest
import torch
from data.photographs import write_classes
from tiny_experiment import load_from

from mas_embed import UserError, load_run, read_results, run_experiment

pytestmark = pytest.mark.usefixtures("blank_pictures")

MONTHS = ("jan", "feb", "mar", "apr")
MAS = {"name": "mas", "strength": 10, "embed": "unnormalized"}


def values(root, splits, methods=("finetune", MAS), **changes):
    """A config over folders of photographs."""
    return {
        "name": "months",
        "data": {"name": "folders", "root": str(root), "splits": list(splits), "image_size": 8},
        "transforms": {"normalize": "data"},
        "model": {"name": "small_conv", "embedding_size": 4, "width": 2},
        "loss": {"name": "TripletMarginLoss"},
        "methods": list(methods),
        "training": {"epochs": 1, "batch_size": 20},
        **changes,
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for month in MONTHS:
        write_classes(root / month, {f"{month} {letter}": 8 for letter in "abc"})
    return root


@pytest.fixture(scope="module")
def begun(photographs, tmp_path_factory):
    """A run over the first two months, with a method that joins them."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
        run_experiment(load_from(folder, values(photographs, MONTHS[:2], ["finetune", MAS, "joint"])), folder / "run")
    return folder / "run"


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


@pytest.fixture
def copied(photographs, tmp_path):
    """The photographs in a folder of their own, to be deleted."""
    return shutil.copytree(photographs, tmp_path / "photographs")


def weights(folder, method):
    return list(load_run(folder, method=method).model.parameters())


def test_the_run_of_all_splits_to_the_bit_and_methods_that_join_start_anew(run, photographs, tmp_path):
    methods = ["finetune", MAS, "joint"]
    config = load_from(tmp_path, values(photographs, MONTHS, methods))
    parts, whole = run_experiment(config, run, resume=True), run_experiment(config, tmp_path / "whole")
    assert parts.splits == list(MONTHS) and parts.methods == whole.methods
    for one, other in zip(parts.runs, whole.runs, strict=True):
        metric = parts.primary_metric
        assert all(map(torch.equal, weights(run, one.method), weights(tmp_path / "whole", one.method)))
        assert one.scores[metric][-1] == other.scores[metric][-1] and one.pooled == other.pooled
        assert one.num_learned is None and one.missing == []
        if one.method != "joint":
            assert one.scores[metric][0][2:] == [None, None] and one.initial[metric][2:] == [None, None]
    assert read_results(run) == parts
    again = run_experiment(config, run, resume=True)
    assert again == parts


def test_the_data_of_the_old_splits_may_be_gone(run, photographs, copied, tmp_path):
    whole = run_experiment(load_from(tmp_path, values(photographs, MONTHS[:3])), tmp_path / "whole")
    for month in MONTHS[:2]:
        shutil.rmtree(copied / month)
    with_joint = load_from(tmp_path, values(copied, MONTHS[:3], ["finetune", MAS, "joint"]))
    with pytest.raises(
        UserError, match="methods.joint trains on all splits at once, but the data of jan, feb is missing"
    ):
        run_experiment(with_joint, run, resume=True)
    config = load_from(tmp_path, values(copied, MONTHS[:3]))
    with pytest.warns(UserWarning, match="the data of jan, feb is missing: these splits are not evaluated"):
        results = run_experiment(config, run, resume=True)
    assert whole.runs[1].num_steps == results.runs[1].num_steps
    for method in ("finetune", "mas"):
        assert all(map(torch.equal, weights(run, method), weights(tmp_path / "whole", method)))
    last = results.runs[1].scores[results.primary_metric][-1]
    assert last[:2] == [None, None] and not math.isnan(last[2])
    assert results.runs[1].missing == ["jan", "feb"]
    (joint,) = results.runs_of("joint")  # was left out
    assert joint.num_learned == 2 and joint.scores[results.primary_metric][0][2] is None
    learned = load_run(run, method="mas").learned
    assert learned.names == list(MONTHS[:3]) and learned.num_classes == 9
    assert learned.label_names["jan/jan b"] == [1] and learned.label_names["mar/mar a"] == [6]
    assert "without jan, feb in the end, whose data was missing" in (run / "report.html").read_text()
    assert json.loads((run / ".mas-embed.json").read_text())["data"]["jan"] is not None
    # Comes back with other data
    write_classes(copied / "feb", {f"feb {letter}": 9 for letter in "abc"})
    with pytest.raises(UserError, match="the data of split 'feb' has changed since the run"):
        run_experiment(config, run, resume=True)


@pytest.mark.parametrize(("splits", "changes", "message"), [
    (["jan", "mar"], {}, "holds a run over the splits jan, feb, but those of this config are jan, mar; with --resume"),
    (["feb", "jan", "mar"], {}, "splits can only be appended"),
    (["jan"], {}, "splits can only be appended"),
    (MONTHS, {"training": {"epochs": 2, "batch_size": 20}}, "holds a run of another config.*training.epochs: 1 there, 2 here"),
    (MONTHS, {"methods": ["finetune", {**MAS, "strength": 3}, "joint"]}, "methods.mas.strength: 10 there, 3 here"),
    (MONTHS, {"methods": ["finetune", MAS, "joint", "lwf"]}, "methods.lwf.name: nothing there"),
    (MONTHS[:2], {"methods": ["finetune", MAS]}, "methods.joint.name: 'joint' there"),
])  # fmt: skip
def test_what_else_differs_is_refused(run, photographs, tmp_path, splits, changes, message):
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    base = {"methods": ["finetune", MAS, "joint"], **changes}
    with pytest.raises(UserError, match=message):
        run_experiment(load_from(tmp_path, values(photographs, splits, **base)), run, resume=True)
    assert before == {path: path.read_bytes() for path in run.rglob("*.json")}


def test_a_training_that_fails_leaves_the_old_results(run, photographs, tmp_path, monkeypatch):
    config = load_from(tmp_path, values(photographs, MONTHS, ["finetune", MAS, "joint"]))
    old = read_results(run)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mas_embed.experiment.runner.train_sequence", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, run, resume=True)
    assert read_results(run) == old
    assert run_experiment(config, run, resume=True).splits == list(MONTHS)


def test_a_split_that_was_not_learned_needs_its_data(run, copied, tmp_path):
    for name in ("checkpoint.safetensors", "checkpoint-previous.safetensors"):
        (run / "mas" / "seed0" / name).unlink(missing_ok=True)
    shutil.rmtree(copied / "jan")
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(Exception, match="mas seed 0: split 'jan' has an empty train part"),
    ):
        run_experiment(load_from(tmp_path, values(copied, MONTHS[:3])), run, resume=True)


def test_resume_starts_a_run_where_there_is_none(photographs, tmp_path):
    results = run_experiment(
        load_from(tmp_path, values(photographs, ["jan"], ["finetune"])), tmp_path / "new", resume=True
    )
    assert len(results.runs) == 1
