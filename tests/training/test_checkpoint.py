import os
import pickle

import pytest
import torch
from small import small_model

from mas_embed import MAS, Importance, RetrievalEvaluator, UserError
from mas_embed.runtime.atomic_files import write_file
from mas_embed.training.checkpoint import load_checkpoint, save_checkpoint

PLAN = {"seed": 0}
EVALUATOR = RetrievalEvaluator()


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
    assert load_checkpoint(tmp_path / "c.safetensors", other, resumed, EVALUATOR, PLAN) == {"plan": PLAN, "rows": [1]}
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert resumed.num_splits == 1
    for state in ("importance", "anchor"):
        assert all(torch.equal(getattr(resumed, state)[name], value) for name, value in getattr(mas, state).items())


def test_a_method_without_state_comes_back(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    resumed = MAS(small_model(seed=1))
    load_checkpoint(tmp_path / "c.safetensors", resumed.model, resumed, EVALUATOR, PLAN)
    assert resumed.importance == resumed.anchor == {}


def test_buffers_that_are_no_floats_and_tied_weights_come_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model(torch.randn(4, 3))
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    other[2].weight = other[0].weight
    load_checkpoint(tmp_path / "c.safetensors", other, MAS(other), EVALUATOR, PLAN)
    assert other[1].num_batches_tracked == 1
    assert torch.equal(other[2].weight, model[0].weight)


def test_the_state_of_the_evaluator_comes_back_in_order(tmp_path):
    model = small_model()
    evaluator = RetrievalEvaluator()
    evaluator._stale_galleries = [torch.full((2, 1), float(position)) for position in range(12)]
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), evaluator, {"plan": PLAN})
    restored = RetrievalEvaluator()
    load_checkpoint(tmp_path / "c.safetensors", model, MAS(model), restored, PLAN)
    assert [int(tensor[0]) for tensor in restored._stale_galleries] == list(range(12))


def test_another_plan_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.safetensors", model := small_model(), MAS(model), EVALUATOR, {"plan": {"seed": 0}})
    with pytest.raises(UserError, match="is of another sequence: its seed is 0, not 1"):
        load_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"seed": 1})


def test_another_model_or_file_is_refused(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "c.safetensors", model, MAS(model), EVALUATOR, {"plan": PLAN})
    with pytest.raises(UserError, match="is of another model"):
        load_checkpoint(tmp_path / "c.safetensors", other := torch.nn.Linear(2, 2), MAS(other), EVALUATOR, PLAN)
    Importance({"a": torch.ones(1)}, 1).save(tmp_path / "i.safetensors")
    with pytest.raises(UserError, match="is not a checkpoint but holds importance"):
        load_checkpoint(tmp_path / "i.safetensors", model, MAS(model), EVALUATOR, PLAN)


def test_a_pickle_is_refused_without_running_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(tmp_path / "c.safetensors", model := small_model(), MAS(model), EVALUATOR, PLAN)
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
    assert load_checkpoint(path, model, MAS(model), EVALUATOR, PLAN)["step"] == 1
    assert [found.name for found in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_file_is_written_whole(tmp_path):
    write_file(tmp_path / "a.txt", "one")
    write_file(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_text() == "two"
