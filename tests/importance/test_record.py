import pickle

import pytest
import torch
from safetensors.torch import save_file

from mas_embed import Importance, UserError, estimate_importance, fingerprint_of
from mas_embed.runtime.atomic_files import write_tensors


def record(values, num_samples=2, **settings):
    return Importance({"a": torch.tensor(values)}, num_samples, settings)


def test_is_a_mapping_of_means():
    importance = record([2.0, 4.0])
    assert importance["a"].tolist() == [1.0, 2.0]
    assert list(importance) == ["a"]
    assert len(importance) == 1
    assert importance.num_samples == 2
    with pytest.raises(KeyError):
        importance["b"]


def test_merge_weights_by_the_number_of_samples():
    merged = Importance.merge(record([2.0], 1), record([4.0], 3))
    assert merged["a"].tolist() == [1.5]
    assert merged.num_samples == 4


def test_merge_refuses_different_settings_and_shapes():
    with pytest.raises(UserError, match="different settings"):
        Importance.merge(record([1.0], output="vector"), record([1.0], output="squared_norm"))
    with pytest.raises(UserError, match="parameters differ: a"):
        Importance.merge(record([1.0]), record([1.0, 2.0]))


def test_save_and_load(tmp_path):
    model = torch.nn.Linear(3, 2)
    importance = estimate_importance(model, [torch.randn(5, 3)], output="vector")
    importance.save(tmp_path / "importance.safetensors")
    loaded = Importance.load(tmp_path / "importance.safetensors")
    assert dict(loaded).keys() == dict(importance).keys()
    assert all(torch.equal(loaded[name], importance[name]) for name in importance)
    assert (loaded.num_samples, loaded.settings) == (importance.num_samples, importance.settings)
    assert loaded.settings == {"output": "vector", "granularity": "sample", "exponent": 1, "embed": None}
    assert [path.name for path in tmp_path.iterdir()] == ["importance.safetensors"]


def test_files_without_importance_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        Importance.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not one that mas-embed wrote"):
        Importance.load(tmp_path / "foreign.safetensors")


def test_a_pickle_is_refused_without_running_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot read"):
        Importance.load(tmp_path / "evil.safetensors")
    assert not (tmp_path / "ran").exists()


def test_loading_for_another_model_names_the_differences(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    estimate_importance(model, [torch.randn(5, 3)]).save(tmp_path / "i.safetensors")
    assert Importance.load(tmp_path / "i.safetensors", model).num_samples == 5
    other = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Identity(), torch.nn.Linear(2, 2))
    message = "not in the model: 1.bias, 1.weight; not in the record: 2.bias, 2.weight; of another shape: 0.weight"
    with pytest.raises(UserError, match=message):
        Importance.load(tmp_path / "i.safetensors", other)


def test_the_fingerprint_changes_with_the_weights(tmp_path):
    model = torch.nn.Linear(3, 2)
    importance = estimate_importance(model, [torch.randn(5, 3)])
    importance.save(tmp_path / "i.safetensors")
    assert Importance.load(tmp_path / "i.safetensors").fingerprint == importance.fingerprint == fingerprint_of(model)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert fingerprint_of(model) != importance.fingerprint
    with pytest.raises(UserError, match="different weights cannot be merged"):
        Importance.merge(importance, estimate_importance(model, [torch.randn(5, 3)]))
    assert (
        len({fingerprint_of(torch.nn.Linear(3, 2).to(dtype)) for dtype in (torch.half, torch.float, torch.double)}) == 3
    )


def test_the_fingerprint_depends_on_the_positions_of_values():
    for shape in ((3, 2), (40, 30)):
        model = torch.nn.Linear(*shape)
        before = fingerprint_of(model)
        with torch.no_grad():
            model.weight.copy_(model.weight.flip(0))
        flipped = fingerprint_of(model)
        with torch.no_grad():
            model.weight.copy_(model.weight.flip(1))
        assert len({before, flipped, fingerprint_of(model)}) == 3


def test_saving_to_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="missing does not exist"):
        record([1.0]).save(tmp_path / "missing" / "i.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": None}, "is damaged: its description has no 'num_samples'"),
        ({"settings": None}, "is damaged: its description has no 'settings'"),
        ({"num_samples": 1.5}, "is damaged: num_samples must be a whole number >= 1, got 1.5"),
        ({"num_samples": 0}, "is damaged: num_samples must be a whole number >= 1, got 0"),
        ({"num_samples": -3}, "is damaged: num_samples must be a whole number >= 1, got -3"),
        ({"num_samples": True}, "is damaged: num_samples must be a whole number >= 1, got True"),
        ({"num_samples": "2"}, "is damaged: num_samples must be a whole number >= 1, got '2'"),
        ({"settings": ["a"]}, "is damaged: the settings of an importance must be a mapping, got list"),
        ({"fingerprint": 3}, "is damaged: the fingerprint of an importance must be a string, got int"),
        ({"kind": None}, "holds None, not an importance"),
        *(
            ({"sums": torch.tensor([1.0, value])}, "is damaged: the importance of 'a' is negative, infinite or NaN")
            for value in (torch.nan, torch.inf, -1.0)
        ),
        (
            {"sums": torch.tensor([1, 2])},
            "is damaged: the sums of an importance must be a mapping from .* floating-point",
        ),
    ],
)
def test_damaged_files_are_one_sentence(changes, message, tmp_path):
    sums = changes.pop("sums", torch.tensor([2.0]))
    description = {"kind": "importance", "num_samples": 2, "settings": {}, "fingerprint": "abc"} | changes
    path = tmp_path / "i.safetensors"
    write_tensors(path, {"a": sums}, {name: value for name, value in description.items() if value is not None})
    with pytest.raises(UserError, match=message):
        Importance.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((({}, value), "num_samples must be a whole number >= 1, got") for value in (0, 1.5, True, "1", None)),
        ((None, 1), "the sums of an importance must be a mapping"),
        (
            ({"a": [1.0]}, 1),
            "the sums of an importance must be a mapping from parameter name to a floating-point tensor",
        ),
        (({3: torch.ones(1)}, 1), "the sums of an importance must be a mapping"),
        (({}, 1, "vector"), "the settings of an importance must be a mapping, got str"),
        (({}, 1, {}, 3), "the fingerprint of an importance must be a string, got int"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        Importance(*arguments)


def test_only_records_are_merged_and_only_modules_are_checked():
    with pytest.raises(UserError, match="only records of importance can be merged, got an object of type dict"):
        Importance.merge(record([1.0]), {"a": torch.ones(1)})
    with pytest.raises(UserError, match="the model must be a torch.nn.Module, got an object of type dict"):
        record([1.0]).check({})
