"""What a state is of: the method and the weights that it was saved with."""

import copy
import json

import pytest
import torch
from torch import nn

from mas_embed import (
    EWC,
    IMM,
    MAS,
    SI,
    Combine,
    Finetune,
    Frozen,
    LwF,
    Method,
    Replay,
    UserError,
    fingerprint_of,
    load_method,
    save_method,
)
from mas_embed.methods import ClassStatistics
from mas_embed.runtime.atomic_files import write_tensors
from mas_embed.runtime.nested_state import flatten_state, unflatten_state


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


def squared(embeddings, labels, mined=None):
    return embeddings.square().mean()


def learned(make, model):
    """The method after a split of one step."""
    method = make(model)
    method.begin_split()
    inputs, labels = torch.randn(6, 3), torch.arange(6) % 2
    model(inputs).square().sum().backward()
    method.add_penalty_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    method.after_step(optimizer)
    model.zero_grad()
    method.consolidate([(inputs, labels)])
    return method


METHODS = {
    "mas": MAS,
    "ewc": lambda model: EWC(model, loss=squared),
    "si": SI,
    "lwf": LwF,
    "imm": IMM,
    "replay": Replay,
    "class_statistics": ClassStatistics,
    "combine": lambda model: Combine(model, methods=[MAS(model), Replay(model)]),
    "finetune": Finetune,
    "frozen": Frozen,
    "frozen layer": lambda model: Frozen(model, only="0"),
}


def shown(state):
    """A state as text."""
    return {key: shown(value) if isinstance(value, dict) else str(value) for key, value in state.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_state_names_its_method_and_weights_and_loads_with_both(name):
    model = network()
    method = learned(METHODS[name], model)
    move(model)  # a state may be saved while the next split is trained
    state = copy.deepcopy(method.state_dict())
    assert state["origin"] == {"method": type(method).__name__, "weights": fingerprint_of(model)}
    twin = network(1)
    twin.load_state_dict(model.state_dict())
    resumed = METHODS[name](twin)
    resumed.load_state_dict(
        unflatten_state({key: value for part in flatten_state(state) for key, value in part.items()})
    )
    assert shown(resumed.state_dict()) == shown(state)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_other_weights_is_refused_unless_asked_for(name):
    model = network()
    state = copy.deepcopy(learned(METHODS[name], model).state_dict())
    other = METHODS[name](network(1))
    before = shown(other.state_dict())
    with pytest.raises(UserError, match="was saved when the model had other weights than now; load the weights"):
        other.load_state_dict(state)
    assert shown(other.state_dict()) == before
    other.load_state_dict(state, allow_other_weights=True)
    assert shown(other._state_without_origin()).keys() == before.keys() - {"origin"}
    assert other.num_bytes == METHODS[name](network(1)).num_bytes or name not in ("finetune", "frozen")


def test_buffers_belong_to_the_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = copy.deepcopy(MAS(model).state_dict())
    model(torch.randn(4, 3))  # moves the running statistics
    with pytest.raises(UserError, match="other weights"):
        MAS(model).load_state_dict(state)


def test_a_state_of_another_method_is_refused_unless_asked_for():
    model = network()
    state = learned(MAS, model).state_dict()
    ewc = EWC(model, loss=squared)
    with pytest.raises(UserError, match="the state is of MAS, not of EWC; make the method that it was saved with"):
        ewc.load_state_dict(state)
    with pytest.raises(UserError, match="the state is of MAS, not of EWC"):
        ewc.load_state_dict(state, allow_other_weights=True)
    assert not ewc.anchor
    ewc.load_state_dict(state, allow_other_method=True)
    assert ewc.anchor.keys() == state["anchor"].keys()
    with pytest.raises(UserError, match="the state lacks path, start; it is not a state of SI but of MAS"):
        SI(model).load_state_dict(state, allow_other_method=True)


def test_the_methods_inside_a_combination_are_compared_too():
    model = network()
    state = Combine(model, methods=[MAS(model), Replay(model)]).state_dict()
    other = Combine(model, methods=[EWC(model, loss=squared), Replay(model)])
    with pytest.raises(UserError, match="the state is of MAS, not of EWC"):
        other.load_state_dict(state)
    other.load_state_dict(state, allow_other_method=True)
    move(model)
    with pytest.raises(UserError, match="other weights"):
        other.load_state_dict(state, allow_other_method=True)
    other.load_state_dict(state, allow_other_method=True, allow_other_weights=True)


def test_a_state_of_an_earlier_version_is_loaded_without_a_comparison():
    state = learned(MAS, network()).state_dict()
    del state["origin"]
    other = EWC(network(1), loss=squared)
    other.load_state_dict(state)
    assert other.num_splits == 1


def test_another_shape_is_named_before_other_weights():
    state = learned(MAS, network()).state_dict()
    mas = MAS(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)))
    with pytest.raises(UserError, match=r"'2.weight' has shape \[5, 4\] but \[2, 4\] in the state"):
        mas.load_state_dict(state)
    assert not mas.importance and mas.num_splits == 0


def test_the_state_of_a_compiled_model_has_the_fingerprint_of_the_model():
    model = network()
    assert MAS(torch.compile(model, backend="eager")).state_dict()["origin"] == MAS(model).state_dict()["origin"]


def test_memory_is_counted_without_a_fingerprint(monkeypatch):
    model = network()
    methods = [MAS(model), Replay(model)]
    combined = Combine(model, methods=methods)
    combined.consolidate([(torch.randn(6, 3), torch.arange(6))])
    monkeypatch.setattr("mas_embed.methods.base.fingerprint_of", lambda model: pytest.fail("costs a pass"))
    assert combined.num_bytes == methods[0].num_bytes + methods[1].num_bytes
    assert methods[0].num_bytes == 2 * 4 * (3 * 4 + 4 + 4 * 2 + 2)


class Own(Method):
    """A method of a user that overrides both functions of the state, as earlier versions asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.value = torch.zeros(3)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class OwnElastic(MAS):
    def __init__(self, model):
        super().__init__(model)
        self.value = torch.zeros(3)

    def state_dict(self):
        return super().state_dict() | {"value": self.value}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.value = state["value"]


@pytest.mark.parametrize("make", [Own, OwnElastic])
def test_methods_of_users_may_override_both_functions_of_the_state(make):
    model = network()
    method, other = make(model), make(model)
    method.value = torch.ones(3)
    other.load_state_dict(method.state_dict())
    assert other.value.tolist() == [1, 1, 1]
    assert other.num_bytes == 12
    combined = Combine(model, methods=[method, MAS(model)])
    again = Combine(model, methods=[make(model), MAS(model)])
    state = copy.deepcopy(combined.state_dict())
    move(model)
    again.load_state_dict(state, allow_other_weights=True)
    assert again.methods[0].value.tolist() == [1, 1, 1]
    assert combined.num_bytes == 12


def test_the_origin_of_a_state_of_a_users_elastic_method():
    model = network()
    state = OwnElastic(model).state_dict()
    assert state["origin"]["method"] == "OwnElastic"
    with pytest.raises(UserError, match="the state is of OwnElastic, not of MAS"):
        MAS(model).load_state_dict(state)


def test_a_state_without_tensors_is_json():
    assert json.loads(json.dumps(Finetune(network()).state_dict()))["origin"]["method"] == "Finetune"


@pytest.mark.parametrize("make", [MAS, LwF, Replay, Finetune, SI, ClassStatistics])
def test_what_is_no_module_is_refused(make):
    models = {"trunk": nn.Linear(3, 4), "embedder": nn.Linear(4, 2)}
    message = (
        f"{make.__name__} takes the model as one torch.nn.Module, got an object of type dict; combine several modules in one, as "
        r"in nn.Sequential\(trunk, embedder\), or in nn.ModuleDict"
    )
    with pytest.raises(UserError, match=message):
        make(models)
    with pytest.raises(UserError, match="got an object of type list"):
        make(list(models.values()))
    make(nn.Sequential(*models.values()))


@pytest.mark.parametrize(
    ("make", "hooks"),
    [
        (MAS, set()),
        (SI, set()),
        (IMM, set()),
        (Finetune, set()),
        (Frozen, set()),
        (LwF, {"batch_penalty"}),
        (Replay, {"extend_batch"}),
        (ClassStatistics, {"extend_batch"}),
        (lambda model: ClassStatistics(model, layer="0"), {"extend_batch", "extend_embeddings"}),
        (lambda model: Combine(model, methods=[MAS(model), SI(model)][::-1]), set()),
        (lambda model: Combine(model, methods=[LwF(model), Replay(model)]), {"batch_penalty", "extend_batch"}),
    ],
)
def test_the_hooks_that_need_the_batch(make, hooks):
    assert make(network()).batch_hooks == hooks


@pytest.mark.parametrize("name", METHODS)
def test_a_state_survives_a_file(tmp_path, name):
    model = network()
    method = learned(METHODS[name], model)
    save_method(tmp_path / "state", method)
    again = METHODS[name](copy.deepcopy(model))
    load_method(tmp_path / "state", again)
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    assert shown(again.state_dict()) == shown(method.state_dict())


def test_a_wrong_file_is_refused(tmp_path):
    model = network()
    method = learned(MAS, model)
    before = shown(method.state_dict())
    path = tmp_path / "state"
    save_method(path, method)
    write_tensors(tmp_path / "importance", {}, {"kind": "importance"})
    write_tensors(tmp_path / "newer", {}, {"kind": "method", "version": 9, "numbers": {}})
    (tmp_path / "text").write_text("not a tensor")
    for file, other, message in (
        ("nothing", method, "cannot read the file .*nothing"),
        ("text", method, "text as a safetensors file"),
        ("importance", method, "importance is not the state of a method but holds 'importance'"),
        ("newer", method, "newer was written by a newer version of mas-embed"),
        ("state", SI(model), "state cannot be loaded: the state lacks path, start; it is not a state of SI but of MAS"),
        ("state", MAS(network(1)), "was saved when the model had other weights than now"),
    ):
        with pytest.raises(UserError, match=message):
            load_method(tmp_path / file, other)
    assert shown(method.state_dict()) == before
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(UserError, match="state is damaged"):
        load_method(path, method)
    with pytest.raises(UserError, match="the folder .* does not exist"):
        save_method(tmp_path / "no" / "folder", method)
