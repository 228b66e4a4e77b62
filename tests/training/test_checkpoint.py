import os
import pickle
from contextlib import suppress

import pytest
import torch
from small import small_model

from mas_embed import MAS, Importance, Replay, RetrievalEvaluator, UserError
from mas_embed.runtime.atomic_files import write_file, write_tensors
from mas_embed.training.checkpoint import load_states, read_checkpoint, save_checkpoint

PLAN = {"seed": 0}
EVALUATOR = RetrievalEvaluator()


def load_checkpoint(path, model, method, evaluator):
    """The progress, once the states are loaded."""
    states, progress = read_checkpoint(path)
    load_states(states, model, method, evaluator, source=path)
    return progress


def consolidated(model):
    mas = MAS(model)
    mas.consolidate([torch.randn(4, 2)])
    return mas


def test_model_and_method_come_back(tmp_path):
    model = small_model()
    mas = consolidated(model)
    save_checkpoint(tmp_path / "c.safetensors", model, mas, EVALUATOR, {"plan": PLAN, "rows": [1]})
    other = small_model(seed=1)
    resumed = MAS(other)
    assert load_checkpoint(tmp_path / "c.safetensors", other, resumed, EVALUATOR) == {"plan": PLAN, "rows": [1]}
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert resumed.num_splits == 1
    for state in ("importance", "anchor"):
        assert all(torch.equal(getattr(resumed, state)[name], value) for name, value in getattr(mas, state).items())


def test_a_method_without_state_comes_back(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    resumed = MAS(small_model(seed=1))
    load_checkpoint(tmp_path / "c.safetensors", resumed.model, resumed, EVALUATOR)
    assert resumed.importance == resumed.anchor == {}


def test_buffers_that_are_no_floats_and_tied_weights_come_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model(torch.randn(4, 3))
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    other[2].weight = other[0].weight
    load_checkpoint(tmp_path / "c.safetensors", other, MAS(other), EVALUATOR)
    assert other[1].num_batches_tracked == 1
    assert torch.equal(other[2].weight, model[0].weight)


def test_the_state_of_the_evaluator_comes_back_in_order(tmp_path):
    model = small_model()
    evaluator = RetrievalEvaluator()
    evaluator._stale_galleries = {f"s{position}": torch.full((2, 1), float(position)) for position in range(12)}
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), evaluator, {"plan": PLAN})
    restored = RetrievalEvaluator()
    load_checkpoint(tmp_path / "c.safetensors", model, MAS(model), restored)
    found = {name: int(tensor[0]) for name, tensor in restored._stale_galleries.items()}
    assert list(found.items()) == [(f"s{position}", position) for position in range(12)]


def test_another_model_or_file_is_refused(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    with pytest.raises(UserError, match="is of another model"):
        load_checkpoint(tmp_path / "c.safetensors", other := torch.nn.Linear(2, 2), MAS(other), EVALUATOR)
    with pytest.raises(UserError, match="is of another method, or damaged: the state lacks"):
        load_checkpoint(tmp_path / "c.safetensors", model, Replay(model), EVALUATOR)
    Importance({"a": torch.ones(1)}, 1).save(tmp_path / "i.safetensors")
    with pytest.raises(UserError, match="is not a checkpoint but holds 'importance'"):
        load_checkpoint(tmp_path / "i.safetensors", model, MAS(model), EVALUATOR)


def test_a_pickle_is_refused_without_running_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(tmp_path / "c.safetensors", model := small_model(), MAS(model), EVALUATOR)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_one(tmp_path, monkeypatch, failing):
    path, model = tmp_path / "c.safetensors", small_model()
    save_checkpoint(path, model, MAS(model), EVALUATOR, {"plan": PLAN, "step": 1})

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(*(("os.fsync", killed) if failing == "fsync" else ("pathlib.Path.replace", killed)))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, MAS(model), EVALUATOR, {"plan": PLAN, "step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path, model, MAS(model), EVALUATOR)["step"] == 1
    assert [found.name for found in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_file_is_written_whole(tmp_path):
    write_file(tmp_path / "a.txt", "one")
    write_file(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_text() == "two"


def test_names_with_slashes_and_tildes_come_back(tmp_path):
    model = torch.nn.Sequential()
    for name in ("a/b", "a~1b", "~"):
        model.add_module(name, torch.nn.Linear(2, 2))
    save_checkpoint(tmp_path / "c.safetensors", model, mas := MAS(model), EVALUATOR, {"plan": PLAN})
    before = [parameter.clone() for parameter in model.parameters()]
    torch.nn.init.zeros_(model[0].weight)
    load_checkpoint(tmp_path / "c.safetensors", model, mas, EVALUATOR)
    assert all(map(torch.equal, before, model.parameters()))


def test_every_flipped_byte_is_noticed_or_changes_nothing(tmp_path):
    path, model = tmp_path / "c.safetensors", small_model()
    save_checkpoint(path, model, mas := consolidated(model), EVALUATOR, {"plan": PLAN})
    content, expected = path.read_bytes(), [parameter.clone() for parameter in model.parameters()]
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with suppress(UserError):
            load_checkpoint(path, model, mas, EVALUATOR)
        assert all(map(torch.equal, expected, model.parameters())), position


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 500])
def test_a_torn_file_says_what_to_do(tmp_path, length):
    path, model = tmp_path / "c.safetensors", small_model()
    save_checkpoint(path, model, MAS(model), EVALUATOR, {"plan": PLAN})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="delete it to train this sequence from its start"):
        load_checkpoint(path, model, MAS(model), EVALUATOR)


@pytest.mark.parametrize("change", [
    {"version": 1}, {"version": None}, {"progress": None}, {"progress": [1]}, {"numbers": None}, {"numbers": "a"},
])  # fmt: skip
def test_a_description_of_another_form_is_refused(tmp_path, change):
    description = {"kind": "checkpoint", "version": 3, "numbers": {}, "progress": {}}
    write_tensors(tmp_path / "c.safetensors", {}, description | change)
    with pytest.raises(UserError, match="delete it"):
        read_checkpoint(tmp_path / "c.safetensors")
