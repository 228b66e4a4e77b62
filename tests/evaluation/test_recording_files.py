"""Files of what was recorded: read as they were written, or refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import train

from mas_embed import RetrievalEvaluator, UserError
from mas_embed.evaluation import (
    Item,
    ItemKey,
    Items,
    RecordedNeighbours,
    RecordedParameters,
    RecordedQueries,
    Recording,
    first_seeds,
    queries_to_show,
    read_items,
    read_parameters,
    read_recordings,
    write_items,
    write_parameters,
    write_recording,
    write_resources,
)
from mas_embed.runtime.atomic_files import write_tensors


def equal(one, other):
    for name, value in vars(one).items():
        counterpart = getattr(other, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, counterpart, err_msg=name)
            assert value.dtype == counterpart.dtype
        elif hasattr(value, "__dict__"):
            equal(value, counterpart)
        else:
            assert value == counterpart, name
    return True


@pytest.fixture(scope="module")
def observations():
    evaluator = RetrievalEvaluator(recall_at=(1,))
    train(evaluator=evaluator)
    return evaluator.observations()


def parameters():
    rows = np.arange(4.0).reshape(2, 2)
    return RecordedParameters(
        names=["trunk.weight", "trunk.bias"],
        num_values=np.array([6, 2]),
        splits=np.array([0, 1], np.int32),
        importance=rows,
        moved=np.array([[np.nan, np.nan], [1, 2]], np.float32),
        anchor_norm=rows.astype(np.float32),
        pull=rows.astype(np.float32),
        importance_now=np.array([3.0, 1.0]),
        quantiles=np.zeros((2, 5), np.float32),
    )


def write_training(folder, observations, method="mas", seed=0):
    training = folder / method / f"seed{seed}"
    training.mkdir(parents=True)
    write_recording(training, Recording(method, seed, "", ["s0", "s1", "s2"], 2), observations)
    return training


def test_a_recording_is_read_as_it_was_written(tmp_path, observations):
    training = write_training(tmp_path, observations)
    write_parameters(training, parameters())
    write_resources(training, {"process_peak": 12})
    (found,) = read_recordings(tmp_path)
    assert (found.method, found.seed, found.folder, found.after) == ("mas", 0, "mas/seed0", 2)
    assert found.splits == ["s0", "s1", "s2"]
    assert all(equal(getattr(found, part), getattr(observations, part)) for part in ("queries", "classes", "map"))
    assert equal(found.parameters, parameters()) and found.parameters.layers() == {"trunk": [0, 1]}
    assert found.memory == {"process_peak": 12}


def test_parameters_before_any_training(tmp_path):
    none = {name: np.zeros((0, 2), np.float32) for name in ("importance", "moved", "anchor_norm", "pull")}
    write_parameters(tmp_path, replace(parameters(), splits=np.zeros(0, np.int32), **none))
    assert read_parameters(tmp_path).moved.shape == (0, 2)


def test_what_is_not_there_is_none(tmp_path, observations):
    write_training(tmp_path, replace(observations, map=None))
    (found,) = read_recordings(tmp_path)
    assert found.map is None and found.parameters is None and found.memory == {}
    assert read_parameters(tmp_path) is None
    assert read_recordings(tmp_path / "nothing") == [] and read_items(tmp_path) is None


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kind": "recording", "version": 2}, "was written by a newer version of mas-embed"),
        ({"kind": "checkpoint", "version": 1}, "does not hold what a training recorded"),
        ({"kind": "recording", "version": 1}, "does not hold what a training recorded"),
    ],
)
def test_other_files_are_refused(tmp_path, description, message):
    (tmp_path / "mas" / "seed0").mkdir(parents=True)
    write_tensors(tmp_path / "mas" / "seed0" / "recording.safetensors", {"x": torch.zeros(1)}, description)
    with pytest.raises(UserError, match=message):
        read_recordings(tmp_path)


def test_a_recording_that_lacks_an_array_is_refused(tmp_path, observations):
    path = write_training(tmp_path, observations) / "recording.safetensors"
    tensors = load_file(path)
    del tensors["queries.now.label"]
    described = {"kind": "recording", "version": 1, "method": "mas", "seed": 0, "splits": ["s0"], "after": 0}
    write_tensors(path, tensors, described)
    with pytest.raises(UserError, match="does not hold what a training recorded"):
        read_recordings(tmp_path)


def test_damaged_files_are_refused(tmp_path, observations):
    training = write_training(tmp_path, observations)
    (training / "resources.json").write_text(json.dumps({"memory": {"process_peak": "much"}}))
    with pytest.raises(UserError, match="resources.json does not hold"):
        read_recordings(tmp_path)
    content = (training / "recording.safetensors").read_bytes()
    (training / "recording.safetensors").write_bytes(content[:-9])
    with pytest.raises(UserError, match="recording.safetensors"):
        read_recordings(tmp_path)


def test_items_are_read_as_they_were_written(tmp_path):
    png, jpeg = b"\x89PNG...", b"\xff\xd8..."
    items = Items(
        {
            ItemKey("query", 0, 3): Item(5, png),
            ItemKey("gallery", 1, 2): Item(6, jpeg),
            ItemKey("gallery", 1, 4): Item(6, text="drei Ähren"),
        },
        {5: "cat"},
        frozenset({1}),
    )
    write_items(tmp_path, items)
    found = read_items(tmp_path)
    assert found == items
    assert found.get("query", 1, 2) == Item(6, jpeg)  # of a split whose queries are its gallery
    assert found.get("gallery", 0, 3) is None
    assert [found.name_of(label) for label in (5, 6)] == ["cat", "6"]
    assert found.get("query", 0, 3).data_uri == "data:image/png;base64,iVBORy4uLg=="
    assert found.get("gallery", 1, 2).media_type == "image/jpeg"
    assert found.get("gallery", 1, 4).data_uri == ""
    write_items(tmp_path, Items(note="Nothing."))
    assert read_items(tmp_path) == Items(note="Nothing.")


def test_damaged_items_are_refused(tmp_path):
    for description, message in (
        ({"kind": "items", "version": 9}, "newer version"),
        ({"kind": "items", "version": 1}, "does not hold the items of a run"),
    ):
        write_tensors(tmp_path / "items.safetensors", {"pictures": torch.zeros(1)}, description)
        with pytest.raises(UserError, match=message):
            read_items(tmp_path)


def recording_of(method, seed, learned, now):
    none = np.full((len(learned), 5), -1)
    neighbours = RecordedNeighbours(none, none, none, none.astype(float))
    arrays = [np.array(values, np.float32) for values in (learned, now)]
    zeros = np.zeros(len(learned), int)
    queries = RecordedQueries(
        "item", "item", "average precision", "cosine", zeros, zeros, zeros, zeros[:1], arrays[1][None], *arrays,
        neighbours, neighbours,
    )  # fmt: skip
    return Recording(method, seed, f"{method}/seed{seed}", ["s"], 0, queries)


def test_queries_that_changed_most_on_average_over_the_methods():
    nan = float("nan")
    recordings = [
        recording_of("a", 1, [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]),  # not the first seed of its method
        recording_of("a", 0, [0.9, 0.9, 0.5, 0.5, nan], [0.1, 0.8, 0.5, 0.9, nan]),  # falls by .8, .1, 0, -.4
        recording_of("b", 2, [0.9, 0.9, 0.5, 0.5, 0.5], [0.9, 0.3, 0.5, 0.6, 0.2]),  # falls by 0, .6, 0, -.1, .3
        Recording("none", 0, "none/seed0", ["s"], 0),
    ]
    assert [(one.method, one.seed) for one in first_seeds(recordings)] == [("a", 0), ("b", 2)]
    shown = queries_to_show(recordings)
    assert shown.fallen == [0, 1, 4]  # .4, .35, .3
    assert shown.improved == [3]
    assert queries_to_show(recordings, most_fallen=1, most_improved=0) == ([0], [])
    assert queries_to_show([]) == ([], [])


def test_seeds_and_methods_are_in_order(tmp_path, observations):
    for method, seed in (("mas", 10), ("ewc", 1), ("mas", 2)):
        write_training(tmp_path, observations, method, seed)
    assert [(one.method, one.seed) for one in read_recordings(tmp_path)] == [("ewc", 1), ("mas", 2), ("mas", 10)]
