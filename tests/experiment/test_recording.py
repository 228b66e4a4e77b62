"""What a run directory records for its report."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import Stopped, small_model
from small import train as train_small
from tiny_experiment import TINY, load_from

from mas_embed import EWC, MAS, UserError, read_results, run_experiment
from mas_embed.data import Part
from mas_embed.evaluation import queries_to_show, read_items, read_parameters, read_recordings
from mas_embed.experiment import ExperimentCallback, build_splits
from mas_embed.experiment import recording as recording_module
from mas_embed.experiment import shown_items as shown_items_module
from mas_embed.experiment.recording import ParameterLog
from mas_embed.experiment.shown_items import update_items
from mas_embed.methods import METHODS, Method
from mas_embed.runtime.atomic_files import read_tensors

pytestmark = pytest.mark.usefixtures("blank_pictures")

METHODS_OF_RUN = ["finetune", {"name": "mas", "strength": 10, "output": "projection"}, "joint"]
CONFIG = TINY | {"methods": METHODS_OF_RUN, "seeds": [0]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run_experiment(load_from(folder, CONFIG), folder / "run", command="mas-embed run tiny.yaml")
    return folder / "run"


def test_every_training_has_a_recording(finished):
    recordings = read_recordings(finished)
    assert [(one.method, one.folder, one.after) for one in recordings] == [
        ("finetune", "finetune/seed0", 1), ("joint", "joint/seed0", 1), ("mas", "mas/seed0", 1),
    ]  # fmt: skip
    samples = {one.queries.index.tobytes() for one in recordings}
    assert len(samples) == 1  # the same queries in every method
    assert [one.queries.rows.tolist() for one in recordings] == [[0, 1], [1], [0, 1]]
    assert [one.parameters is None for one in recordings] == [True, True, False]
    assert all(one.memory["process_peak"] > 2**20 for one in recordings)
    assert [run.folder for run in read_results(finished).runs] == ["finetune/seed0", "mas/seed0", "joint/seed0"]
    for run, matrix in ((run, run.matrix("mean_average_precision")) for run in read_results(finished).runs):
        (recorded,) = [one for one in recordings if one.method == run.method]
        for split in range(2):  # all of the few held-out images are recorded
            mean = recorded.queries.scores[-1][recorded.queries.split == split].mean()
            assert mean == pytest.approx(matrix[len(matrix.scores) - 1, split], abs=1e-6)


def test_the_size_is_bounded(finished):
    for path in finished.glob("*/seed*/recording.safetensors"):
        assert path.stat().st_size < 2**18


def test_the_items_that_are_shown_are_there(finished):
    recordings, items, splits = read_recordings(finished), read_items(finished), build_splits(load_of(finished))
    assert items.note is None
    shown = queries_to_show(recordings)
    assert shown.fallen
    for position in (*shown.fallen, *shown.improved):
        for queries in (one.queries for one in recordings):
            keys = [("query", queries.split[position], queries.index[position])]
            for neighbours in (queries.learned, queries.now):
                pairs = zip(neighbours.split[position], neighbours.index[position], strict=True)
                keys += [("gallery", split, index) for split, index in pairs]
            for part, split, index in keys:
                item, source = items.get(part, split, index), getattr(splits[split], part)
                assert item.label == source.labels[index]
                pixels = np.asarray(Image.open(io.BytesIO(item.picture)))
                np.testing.assert_array_equal(pixels, (source.inputs[index][0] * 255).round().byte().numpy())


def load_of(finished):
    return load_from(finished.parent, CONFIG)


def test_pictures_are_left_out_if_they_must_not_leave_their_folder(finished, tmp_path):
    config = load_from(tmp_path, CONFIG | {"methods": ["finetune"], "report": {"thumbnails": False}})
    assert "thumbnails: false" in config.to_yaml()
    run_experiment(config, tmp_path / "run")
    items = read_items(tmp_path / "run")
    assert items.items == {} and "report.thumbnails: false" in items.note
    content = (tmp_path / "run" / "items.safetensors").read_bytes()
    assert b"PNG" not in content


def test_thumbnails_are_true_or_false(tmp_path):
    with pytest.raises(UserError, match="report.thumbnails"):
        load_from(tmp_path, CONFIG | {"report": {"thumbnails": "no"}})
    with pytest.raises(UserError, match="report.thumbnail"):
        load_from(tmp_path, CONFIG | {"report": {"thumbnail": False}})
    assert load_from(tmp_path, CONFIG).report.thumbnails is True


def content_of(path):
    """Tensors and description of a file: the order of the entries of its header is not the same each time."""
    tensors, description = read_tensors(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, description


def test_items_are_made_again_from_the_recordings_alone(finished, monkeypatch):
    path = finished / "items.safetensors"
    content, expected = path.read_bytes(), content_of(path)
    splits = build_splits(load_of(finished))
    update_items(finished, splits, thumbnails=True)
    assert content_of(path) == expected
    path.write_bytes(content[:-5])  # damaged
    update_items(finished, splits, thumbnails=True)
    assert content_of(path) == expected
    path.unlink()
    monkeypatch.setattr(shown_items_module, "MOST_BYTES", 2000)
    update_items(finished, splits, thumbnails=True)
    few = read_items(finished).items
    assert sum(len(item.picture) for item in few.values()) <= 2000
    path.write_bytes(content)
    assert list(few) == list(read_items(finished).items)[: len(few)]  # the most changed queries first


class UnreadableImages(list):
    def __getitem__(self, index):
        raise UserError("the file is gone")


def test_an_item_that_cannot_be_read_any_more_is_no_picture():
    part = Part(UnreadableImages([0, 1]), torch.tensor([4, 5]))
    assert shown_items_module._item(part, 1) == shown_items_module.Item(5)


def test_the_command_is_stored(finished, tmp_path):
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["command"] == "mas-embed run tiny.yaml"


def test_overwriting_removes_what_was_recorded(finished, tmp_path):
    config = load_from(tmp_path, CONFIG | {"methods": ["finetune"]})
    run_experiment(config, tmp_path / "run")
    without = load_from(
        tmp_path, CONFIG | {"methods": ["frozen"], "evaluation": {"name": "retrieval", "recorded_queries": 0}}
    )
    run_experiment(without, tmp_path / "run", overwrite=True)
    assert read_recordings(tmp_path / "run") == [] and read_items(tmp_path / "run") is None
    assert not (tmp_path / "run" / "finetune").exists()


class StopAfter(ExperimentCallback):
    def __init__(self, method, split_index):
        self.method, self.split_index = method, split_index

    def on_split_end(self, event):
        if (event.method, event.split_index) == (self.method, self.split_index):
            raise Stopped


@pytest.mark.parametrize(("method", "split_index"), [("mas", 0), ("mas", 1), ("finetune", 0)])
def test_a_resumed_run_records_the_same(finished, tmp_path, method, split_index):
    config = load_from(tmp_path, CONFIG)
    with pytest.raises(Stopped):
        run_experiment(config, tmp_path / "run", callbacks=[StopAfter(method, split_index)])
    assert read_recordings(tmp_path / "run")  # of what is there so far
    for path in (tmp_path / "run" / method / "seed0").glob("*.safetensors"):
        if path.name == "recording.safetensors":
            path.unlink()  # as if the process had been killed after the checkpoint, before this file
    run_experiment(config, tmp_path / "run", resume=True)
    names = [path.relative_to(finished) for path in finished.glob("*/seed*/*.safetensors")]
    for name in [*names, "items.safetensors"]:
        if "checkpoint" not in str(name):
            assert content_of(tmp_path / "run" / name) == content_of(finished / name), name


class Snapshots(ExperimentCallback):
    """The weights at the end of training on every split, and after the method has consolidated."""

    def __init__(self, method):
        self.method, self.trained, self.anchored = method, [], []

    def on_epoch_end(self, event):
        if event.epoch == event.num_epochs - 1:
            weights = {name: value.detach().clone() for name, value in self.method.model.named_parameters()}
            anchored = {name: tuple(one) for name, one in self.method.anchored_parameters().items()}
            self.trained.append((weights, anchored))


@pytest.mark.parametrize("make", [lambda model: MAS(model, strength=3.0), lambda model: EWC(model, loss=pull)])
def test_parameters_against_loops(tmp_path, make):
    model = small_model()
    method = make(model)
    snapshots = Snapshots(method)
    train_small(lambda _: method, model, callbacks=[ParameterLog(tmp_path, method), snapshots])
    found = read_parameters(tmp_path)
    assert found.names == [name for name, _ in model.named_parameters()]
    assert found.splits.tolist() == [0, 1, 2]
    for row, (weights, anchored) in enumerate(snapshots.trained):
        for column, name in enumerate(found.names):
            values = [getattr(found, key)[row, column] for key in ("importance", "moved", "anchor_norm", "pull")]
            if name not in anchored:
                assert values[0] == 0 and np.isnan(values[1:]).all()
                continue
            importance, anchor = (one.flatten().tolist() for one in anchored[name])
            moved = [(a - b) ** 2 for a, b in zip(weights[name].flatten().tolist(), anchor, strict=True)]
            expected = [
                sum(importance),
                sum(moved),
                sum(value**2 for value in anchor),
                sum(a * b for a, b in zip(importance, moved, strict=True)),
            ]
            assert values == pytest.approx(expected, rel=1e-4)
    assert np.isnan(found.moved[0]).all() and (found.moved[1:] > 0).all()
    for column, name in enumerate(found.names):
        importance = method.importance[name].flatten().numpy()
        assert found.num_values[column] == importance.size
        assert found.importance_now[column] == pytest.approx(importance.sum(), rel=1e-5)
        np.testing.assert_allclose(
            found.quantiles[column], np.quantile(importance, [0.05, 0.25, 0.5, 0.75, 0.95]), rtol=1e-5
        )


def pull(embeddings, labels, mined=None):
    return embeddings.square().sum(1).mean()


def test_methods_say_what_they_anchor():
    model = small_model()
    assert Method(model).anchored_parameters() == {}
    mas = MAS(model)
    assert mas.anchored_parameters() == {}
    mas.consolidate([torch.ones(2, 2)])
    assert mas.anchored_parameters().keys() == mas.importance.keys()
    both = METHODS["combine"](model, methods=[METHODS["finetune"](model), mas])
    assert both.anchored_parameters()["0.weight"].importance is mas.importance["0.weight"]


def test_the_number_of_parameters_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_module, "MOST_PARAMETERS", 2)
    model = small_model()
    method = MAS(model)
    train_small(lambda _: method, model, callbacks=[ParameterLog(tmp_path, method)])
    assert read_parameters(tmp_path).names == ["0.weight", "2.weight"]
