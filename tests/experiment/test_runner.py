import json
import shutil

import numpy as np
import pytest
from small import Stopped
from tiny_experiment import TINY, load_from

from mas_embed import DATASETS, Part, Split, UserError, digits, load_config, read_results, run_experiment
from mas_embed.errors import RunError
from mas_embed.experiment import ExperimentCallback, runner
from mas_embed.experiment.runner import runs_of
from mas_embed.report import cost_table, selection_table, summary_table
from mas_embed.runtime.environment import describe_environment

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def tiny(tmp_path):
    return lambda **changes: load_from(tmp_path, TINY | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_experiment(load_from(folder, TINY), folder / "run")
    return folder / "run"


def scores_of(results):
    return [run.model_dump(exclude={"seconds"}) for run in results.runs]


class Listener(ExperimentCallback):
    """Writes down what happens, and stops at the event for which `stop_at(kind, method, seed, split_index)` is true."""

    def __init__(self, stop_at=lambda *event: False):
        self.events = []
        self._stop_at = stop_at

    def _record(self, *event):
        self.events.append(event)
        if self._stop_at(*event):
            raise Stopped

    def on_epoch_end(self, event):
        self._record("epoch", event.method, event.seed, event.split_index)

    def on_split_end(self, event):
        self._record("split", event.method, event.seed, event.split_index)

    def on_run_recorded(self, record):
        self._record("run", record.method, record.seed, None)

    def on_run_skipped(self, run):
        self._record("skip", run.method.title, run.seed, None)

    def on_candidate_end(self, method, candidate):
        self._record("candidate", method, candidate.options, None)


def test_the_run_directory(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".mas-embed.json", ".mas-embed.lock", "config.yaml", "confused.png", "environment.json", "finetune", "frozen", "items.safetensors", "joint",
        "kept.png", "layers.png", "map.png", "mas", "report.html", "results.json", "scores.png", "stale_gallery.png", "trade_off.png",
    ]  # fmt: skip
    for method in ("finetune", "frozen", "joint", "mas"):
        for seed in (0, 1):
            assert sorted(path.name for path in (finished / method / f"seed{seed}").iterdir()) == [
                ".checkpoint.safetensors.lock",
                "checkpoint-previous.safetensors",
                "checkpoint.safetensors",
                "log.jsonl",
                "model.safetensors",
                *(["parameters.safetensors"] if method == "mas" else []),
                "recording.safetensors",
                "resources.json",
            ]
    results = json.loads((finished / "results.json").read_text())
    assert results.keys() == {"schema", "name", "splits", "primary_metric", "runs", "selections"}
    assert (results["schema"], results["name"], results["splits"]) == (2, "tiny", ["0-4", "5-9"])
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        (method, seed) for seed in (0, 1) for method in ("finetune", "frozen", "mas", "joint")
    ]
    run = results["runs"][2]
    assert run["options"] == {
        "strength": 10, "output": "projection", "accumulation": "sum", "decay": 0.9, "normalize": False, "decoupled": False,
        "embed": None,
    }  # fmt: skip
    assert np.shape(run["scores"]["mean_average_precision"]) == (2, 2)
    assert np.shape(results["runs"][3]["scores"]["mean_average_precision"]) == (1, 2)
    assert results["runs"][3]["measures"]["mean_average_precision"]["forgetting"] is None
    assert run["seconds"].keys() == {"training", "importance", "evaluation"}


def test_measures_are_those_of_the_matrix(finished):
    for run in read_results(finished).runs:
        matrix, measures = run.scores["r_precision"], run.measures["r_precision"]
        assert measures["final_average"] == pytest.approx(sum(matrix[-1]) / 2)
        if len(matrix) == 2:
            assert measures["forgetting"] == pytest.approx(matrix[0][0] - matrix[1][0])
            assert measures["forward_transfer"] == pytest.approx(matrix[0][1] - run.initial["r_precision"][1])


def test_every_method_of_a_seed_starts_from_the_same_weights(finished):
    runs = read_results(finished).runs
    for seed in (0, 1):
        initial = [run.initial for run in runs if run.seed == seed]
        assert all(other == initial[0] for other in initial)
    # Nothing to protect yet: after the first split the methods are still the same
    first = {
        run.method: run.scores["mean_average_precision"][0] for run in runs if run.seed == 0 and run.method != "joint"
    }
    assert first["finetune"] == first["frozen"] == first["mas"]


def test_the_same_config_gives_the_same_scores(finished, tiny, tmp_path):
    again = run_experiment(tiny(), tmp_path / "again")
    assert scores_of(again) == scores_of(read_results(finished))
    assert (tmp_path / "again" / "config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_the_written_config_repeats_the_run(finished, tmp_path):
    again = run_experiment(
        load_config(
            finished / "config.yaml",
            ["seeds=[1]", "methods=[mas]", "methods.mas.strength=10", "methods.mas.output=projection"],
        ),
        tmp_path / "r",
    )
    (expected,) = (run for run in read_results(finished).runs if (run.method, run.seed) == ("mas", 1))
    assert again.runs[0].scores == expected.scores


EVERY_METHOD = [
    *({"name": name, "normalize": True} for name in ("local_mas", "ewc", "si")),
    {"name": "ewc", "label": "ewc of batches", "mode": "online", "fisher": "batch", "loss": "NTXentLoss"},
    "lwf", "imm", {"name": "imm", "label": "imm mode", "mode": "mode"}, "replay",
    {"name": "combine", "methods": [{"name": "mas", "output": "projection"}, {"name": "lwf", "strength": 0.1}]},
    {"name": "combine", "label": "ewc and replay", "methods": ["ewc", "replay"]},
]  # fmt: skip


def test_every_method_of_a_config_is_trained(tiny, tmp_path):
    results = run_experiment(
        tiny(methods=EVERY_METHOD, seeds=[0], evaluation={"follow_index": False}), tmp_path / "run"
    )
    first = [run.scores["mean_average_precision"][0] for run in results.runs]
    assert all(row == first[0] for row in first)  # nothing to protect yet
    last = {run.method: run.scores["mean_average_precision"][1] for run in results.runs}
    assert len({tuple(row) for row in last.values()}) == len(last) == len(EVERY_METHOD)


def test_the_log_has_every_epoch_and_split(finished):
    events = [json.loads(line) for line in (finished / "mas" / "seed0" / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["epoch", "split", "epoch", "split"]


def test_results_are_never_overwritten_unasked(finished, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run already: pass --resume to go on with it, --overwrite"):
        run_experiment(tiny(), out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_overwrite_replaces_a_run_and_nothing_else(finished, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    (out / "mas" / "thoughts.txt").write_text("mine too")
    results = run_experiment(tiny(methods=["finetune"], seeds=[0]), out, overwrite=True)
    assert len(results.runs) == 1
    assert not (out / "joint").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in (out / "mas").iterdir()] == ["thoughts.txt"]


@pytest.mark.parametrize("stop_at", [("epoch", "mas", 1, 1), ("split", "finetune", 0, 0), ("run", "frozen", 0, None)])
def test_resumed_is_uninterrupted(finished, tiny, tmp_path, stop_at):
    with pytest.raises(Stopped):
        run_experiment(tiny(), tmp_path / "run", callbacks=[Listener(lambda *event: event == stop_at)])
    listener = Listener()
    results = run_experiment(tiny(), tmp_path / "run", resume=True, callbacks=[listener])
    assert scores_of(results) == scores_of(read_results(finished))
    num_done = {"epoch": 6, "split": 0, "run": 2}[stop_at[0]]
    assert [event[0] for event in listener.events].count("skip") == num_done


def test_another_config_is_not_resumed(finished, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with pytest.raises(UserError, match="holds a run of another config"):
        run_experiment(tiny(seeds=[7]), out, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"callbacks": [{"name": "step_log", "every": 0}]}, "callbacks.step_log: every must be at least 1"),
        ({"subsets": {"a": {"split": "7"}}}, "subsets.a: unknown split '7'"),
        ({"data": {"name": "digits", "num_splits": 3}}, "data: num_splits must divide"),
        (
            {"training": {"sampler": {"name": "MPerClassSampler", "m": 200}}},
            "training.sampler on split '0-4': .* m=200 images per class, but class",
        ),
        ({"loss": {"name": "TripletMarginLoss", "triplets_per_anchor": "some"}}, "loss"),
        ({"loss": {"name": "ProxyNCALoss", "num_classes": "ten"}}, "loss"),
        ({"model": {"name": "small_conv", "channels": 3}}, "model: the model refuses inputs of shape .*channels"),
        (
            {"methods": ["mas"]},
            "methods.mas: .*output='squared_norm' is constant for embeddings of unit length, .*; use output='projection'",
        ),
        ({"model": {"name": "small_conv", "embedding_size": 0}}, "model: embedding_size must be a whole number >= 1"),
        ({"training": {"sampler": {"name": "MPerClassSampler", "m": 0}}}, "m, images per class, must be at least 1"),
        ({"training": {"optimizer": {"name": "LBFGS"}}}, "training.optimizer does not work with these options"),
        (
            {"loss": {"name": "ArcFaceLoss", "num_classes": 2}},
            "loss: num_classes is 2 in the config, but 10 in this run; leave it out to have it filled in",
        ),
        (
            {"loss": {"name": "ProxyAnchorLoss", "embedding_size": 5}},
            "loss: embedding_size is 5 in the config, but 4 in this run",
        ),
        (
            {"evaluation": {"primary_metric": "recall_at_3"}},
            "unknown evaluation.primary_metric 'recall_at_3': did you mean",
        ),
        ({"evaluation": {"recall_at": []}}, "evaluation: recall_at must hold whole numbers >= 1"),
        (
            {"training": {"scheduler": {"name": "ReduceLROnPlateau"}}},
            "training.scheduler: it steps on a measured value",
        ),
        ({"training": {"scheduler": {"name": "CosineAnnealingLR", "T_max": 0}}}, "training.scheduler does not work"),
        (
            {"importance": {"data": "ones"}, "subsets": {"ones": {"labels": ["one"]}}},
            "subsets.ones: the labels of this data set have no names",
        ),
        ({"methods": [{"name": "mas", "embed": "state_dict"}]}, "methods.mas"),
        ({"methods": [{"name": "combine", "methods": ["mas"]}]}, "methods.combine: combine needs at least two methods"),
        ({"methods": [{"name": "combine", "methods": ["lwf", "si"]}]}, "methods.combine: si must be the first"),
        (
            {"methods": ["ewc"], "loss": "ProxyNCALoss"},
            "methods.ewc: EWC takes the gradient of the training loss, but ProxyNCALoss has parameters",
        ),
        ({"methods": [{"name": "replay", "share": 1}]}, "methods.replay: share must be from 0 to below 1, got 1"),
        ({"methods": [{"name": "mas", "embed": "raw"}]}, "methods.mas: .*no method 'raw'"),
        ({"methods": [{"name": "mas", "strength": -1}]}, "methods.mas: strength must be a finite number >= 0, got -1"),
        ({"methods": [{"name": "mas", "output": "norm"}]}, "methods.mas: unknown output 'norm'"),
        (
            {"training": {"optimizer": {"name": "Adam", "lr": -1.0}}},
            "training.optimizer does not work with these options: invalid learning rate",
        ),
    ],
)
def test_a_config_that_cannot_be_trained_writes_nothing(tiny, tmp_path, changes, message):
    config = tiny(**changes)
    with pytest.raises(UserError, match=f"(?i){message}"):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_a_file_and_flags_that_exclude_each_other(tiny, tmp_path):
    with pytest.raises(UserError, match="tiny.yaml is a file, not a folder; name another with --out"):
        run_experiment(tiny(), tmp_path / "tiny.yaml")
    with pytest.raises(UserError, match="--resume keeps what is there and --overwrite replaces it"):
        run_experiment(tiny(), tmp_path / "run", resume=True, overwrite=True)


def test_runs_are_told_apart_by_label(tiny):
    config = tiny(methods=[{"name": "mas", "label": "weak"}, "mas"], seeds=[3])
    assert [run.folder for run in runs_of(config)] == ["weak/seed3", "mas/seed3"]


def test_the_environment_names_hardware_and_versions():
    environment = describe_environment()
    assert environment["cores"] >= 1
    assert environment["packages"].keys() >= {"torch", "pytorch-metric-learning"}


SELECT = {"name": "mas", "output": "projection", "select": {"strength": [1, 100], "seeds": [7, 8]}}


def test_options_are_selected_on_the_validation_part_and_their_cost_is_told(tiny, tmp_path):
    config = tiny(methods=["finetune", SELECT], seeds=[0])
    results = run_experiment(config, tmp_path / "run")
    selection = results.selections["mas"]
    assert [candidate.options for candidate in selection.candidates] == [{"strength": 1}, {"strength": 100}]
    for candidate in selection.candidates:
        alone = tiny(
            data=TINY["data"] | {"held_out": "validation"},
            methods=[{"name": "mas", "output": "projection", **candidate.options}],
            seeds=[7, 8],
        )
        runs = run_experiment(alone, tmp_path / f"alone{candidate.options['strength']}").runs
        finals = [run.measures["mean_average_precision"]["final_average"] for run in runs]
        assert candidate.values == finals
        assert candidate.mean == pytest.approx(np.mean(finals))
        assert candidate.seconds > 0
    best = max(selection.candidates, key=lambda candidate: candidate.mean)
    assert selection.chosen == best.options
    (run,) = (run for run in results.runs if run.method == "mas")
    assert run.options["strength"] == best.options["strength"]
    assert "select" not in run.options
    table = selection_table(results)
    assert [row[-1] for row in table.rows].count("chosen") == 1


def test_a_validation_part_that_cannot_be_evaluated_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Its one query has no other image of its class."""

    def lonely(*, held_out="test"):
        splits = digits(num_splits=2)
        if held_out == "test":
            return splits
        lone = Part(splits[0].query.inputs[:1], splits[0].query.labels[:1])
        return [Split("a", splits[0].train, lone, lone), *splits[1:]]

    monkeypatch.setitem(DATASETS._components, "lonely", lonely)
    config = load_from(tmp_path, TINY | {"data": {"name": "lonely"}, "methods": [SELECT], "training": {"epochs": 1}})
    with pytest.raises(
        UserError, match="data with held_out=validation, on which options are chosen: split 'a' has queries"
    ):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_candidate_that_fails_is_told_and_another_chosen(tiny, tmp_path, monkeypatch):
    real = runner.train_sequence

    def failing(model, splits, *, method, **options):
        if getattr(method, "strength", 0) == 100:
            raise RunError("training diverged, the loss is nan")
        return real(model, splits, method=method, **options)

    monkeypatch.setattr(runner, "train_sequence", failing)
    results = run_experiment(tiny(methods=[SELECT], seeds=[0]), tmp_path / "run")
    assert results.selections["mas"].chosen == {"strength": 1}
    assert results.selections["mas"].candidates[1].error == "seed 7: training diverged, the loss is nan"
    assert "training diverged" in (tmp_path / "run" / "report.html").read_text()


def test_a_stopped_selection_goes_on_where_it_was(tiny, tmp_path):
    config = tiny(methods=[SELECT | {"select": {"strength": [1, 100], "seeds": [7]}}], seeds=[0])
    with pytest.raises(Stopped):
        run_experiment(config, tmp_path / "run", callbacks=[Listener(lambda kind, *_: kind == "candidate")])
    listener = Listener()
    resumed = run_experiment(config, tmp_path / "run", resume=True, callbacks=[listener])
    assert [event[2] for event in listener.events if event[0] == "candidate"] == [{"strength": 100}]
    assert scores_of(resumed) == scores_of(run_experiment(config, tmp_path / "whole"))


def test_what_a_method_keeps_is_written_down(tiny, tmp_path):
    methods = ["finetune", {"name": "replay", "buffer_size": 10}]
    results = run_experiment(tiny(methods=methods, seeds=[0]), tmp_path / "run")
    finetune, replay = results.runs
    assert (finetune.keeps, finetune.num_bytes, replay.keeps) == ("nothing", 0, "data")
    assert replay.num_bytes == 10 * (64 * 4 + 8 + 8 + 8)
    steps = [json.loads(line) for line in (tmp_path / "run/finetune/seed0/log.jsonl").read_text().splitlines()]
    assert finetune.num_steps == sum(step.get("num_batches", 0) for step in steps) > 0
    assert cost_table(results).rows[1][:2] == ["replay", "data"]
    assert summary_table(results).rows[1][0] == "replay (keeps data)"


@pytest.mark.parametrize("name", ["ProxyAnchorLoss", "ArcFaceLoss"])
def test_classes_and_embedding_sizes_need_not_be_counted_by_hand(tiny, tmp_path, name):
    results = run_experiment(tiny(loss=name, methods=["finetune"], seeds=[0]), tmp_path / "run")
    assert results.runs[0].num_steps > 0
    assert "num_classes" not in (tmp_path / "run" / "config.yaml").read_text()
    stated = tiny(loss={"name": name, "num_classes": 10, "embedding_size": 4}, methods=["finetune"], seeds=[0])
    assert run_experiment(stated, tmp_path / "stated").runs[0].scores == results.runs[0].scores


def test_scores_that_were_not_measured_are_null(tiny, tmp_path):
    evaluation = {"every": 2, "only_learned": True}
    results = run_experiment(
        tiny(data={"name": "digits", "num_splits": 5}, methods=["finetune", "joint"], seeds=[0], evaluation=evaluation),
        tmp_path / "run",
    )
    raw = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    is_measured = [[score is not None for score in row] for row in raw[0]["scores"]["r_precision"]]
    nothing = [False] * 5
    assert is_measured == [nothing, [True, True, False, False, False], nothing, [True] * 4 + [False], [True] * 5]
    assert raw[0]["num_averaged"] == {"final_average": 5, "forgetting": 4, "backward_transfer": 2, "learning": 3}
    assert raw[1]["scores"]["r_precision"][0].count(None) == 0
    assert read_results(tmp_path / "run") == results
    assert "learning is a mean over 3 of 5 splits" in (tmp_path / "run" / "report.html").read_text()


def test_callbacks_of_a_config_write_into_the_folder_of_the_run(tiny, tmp_path):
    config = tiny(callbacks=[{"name": "step_log", "every": 2}], methods=["finetune"], seeds=[0])
    results = run_experiment(config, tmp_path / "run")
    lines = (tmp_path / "run" / "finetune" / "seed0" / "steps.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] % 2 for step in steps] == [0] * len(steps)
    assert 2 * len(steps) <= results.runs[0].num_steps < 2 * len(steps) + 4
    assert steps[0].keys() == {
        "split", "split_index", "num_splits", "epoch", "step", "loss", "penalty", "learning_rate",
    }  # fmt: skip
