import copy
import threading

import pytest
import torch
from torch import nn

from mas_embed import Importance, OnlineImportance, UserError, estimate_importance


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))
    return model.double().eval(), torch.randn(12, 4, dtype=torch.float64)


def assert_equal(importance, expected):
    assert importance.num_samples == expected.num_samples
    for name in expected:
        torch.testing.assert_close(importance[name], expected[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_all_samples_observed_is_the_estimate(context):
    model, inputs = build()
    online = OnlineImportance(model)
    with context():
        for request in inputs.split(5):
            model(request)
            online.observe(request)
        importance = online.importance()
    assert_equal(importance, estimate_importance(model, [inputs]))


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_every_third_sample_does_not_depend_on_the_size_of_requests(sizes):
    model, inputs = build()
    online = OnlineImportance(model, every=3)
    for request in inputs.split(sizes):
        online.observe(request)
    assert_equal(online.importance(), estimate_importance(model, [inputs[::3]]))


def test_decay_by_hand():
    model, inputs = build()
    online = OnlineImportance(model, decay=0.5)
    for request in inputs.split(4):
        online.observe(request)
    first, second, third = (estimate_importance(model, [request]) for request in inputs.split(4))
    for name, value in online.importance().items():
        expected = (0.25 * first[name] + 0.5 * second[name] + third[name]) / 1.75
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    assert online.importance().num_samples == 12


def test_records_of_several_servers_can_be_merged():
    model, inputs = build()
    servers = [OnlineImportance(copy.deepcopy(model)) for _ in range(3)]
    for server, share in zip(servers, inputs.split([2, 7, 3]), strict=True):
        server.observe(share)
    assert_equal(Importance.merge(*(server.importance() for server in servers)), estimate_importance(model, [inputs]))


def test_state_survives_a_restart(tmp_path):
    model, inputs = build()
    online = OnlineImportance(model, every=2, decay=0.9)
    online.observe(inputs[:5])
    torch.save(online.state_dict(), tmp_path / "state.pt")
    resumed = OnlineImportance(copy.deepcopy(model), every=2, decay=0.9)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for server in (online, resumed):
        server.observe(inputs[5:])
    assert_equal(resumed.importance(), online.importance())
    other = OnlineImportance(nn.Linear(4, 2).double())
    with pytest.raises(UserError, match="collected with another fingerprint"):
        other.load_state_dict(online.state_dict())
    for options, message in (
        ({"every": 3}, "another every"),
        ({"output": "vector", "every": 2, "decay": 0.9}, "another settings"),
    ):
        with pytest.raises(UserError, match=message):
            OnlineImportance(copy.deepcopy(model), **options).load_state_dict(online.state_dict())


def test_a_refused_batch_changes_nothing():
    model, inputs = build()
    online = OnlineImportance(model, decay=0.5)
    online.observe(inputs)
    before = online.importance()
    with pytest.raises(UserError, match="NaN"):
        online.observe(torch.full((3, 4), torch.nan, dtype=torch.float64))
    assert_equal(online.importance(), before)


def test_a_batch_with_a_gradient_that_is_not_finite_changes_nothing():
    model, inputs = build()
    online = OnlineImportance(
        model, embed=lambda model, batch: model(batch) + (model[0](batch) * 0).abs().sqrt()[:, :3]
    )
    with pytest.raises(UserError, match="NaN or infinite for at least one sample"):
        online.observe(inputs)
    with pytest.raises(UserError, match="nothing was observed yet"):
        online.importance()


def test_other_threads_may_use_the_model_at_the_same_time():
    model, inputs = build()
    online, expected = OnlineImportance(model), model(inputs).detach()
    wrong, stop = [], threading.Event()

    def serve():
        with torch.inference_mode():
            while not stop.is_set():
                if not torch.equal(model(inputs), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    observers = [threading.Thread(target=lambda: [online.observe(inputs) for _ in range(20)]) for _ in range(2)]
    for thread in observers:
        thread.start()
    for thread in observers:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    importance = online.importance()
    assert importance.num_samples == 40 * len(inputs)
    estimate = estimate_importance(model, [inputs])
    for name, value in importance.items():
        torch.testing.assert_close(value, estimate[name], rtol=1e-9, atol=1e-14)


def test_memory_does_not_grow_with_requests():
    model, inputs = build()
    online = OnlineImportance(model)
    for _ in range(3):
        online.observe(inputs)
    assert len(online._batch_importance.norms) == len(online._batch_importance._sample_checks) == 1


def test_nothing_observed_and_invalid_arguments():
    model, _ = build()
    with pytest.raises(UserError, match="nothing was observed yet"):
        OnlineImportance(model).importance()
    with pytest.raises(UserError, match="every must be at least 1"):
        OnlineImportance(model, every=0)
    with pytest.raises(UserError, match="decay must lie between 0 and 1"):
        OnlineImportance(model, decay=1.0)
    for value in (1.5, True, "2", None):
        with pytest.raises(UserError, match="every must be a whole number, got"):
            OnlineImportance(model, every=value)
    for value in (float("nan"), True, "0.5"):
        with pytest.raises(UserError, match="decay must be a finite number, got"):
            OnlineImportance(model, decay=value)
    with pytest.raises(UserError, match="no trainable parameter"):
        OnlineImportance(model.requires_grad_(False))


def test_inputs_of_another_width_are_refused_and_change_nothing():
    model, inputs = build()
    online = OnlineImportance(model)
    online.observe(inputs)
    with pytest.raises(
        UserError, match=r"^the model refuses inputs of shape \[3, 5\] \(torch.float64\): mat1"
    ) as caught:
        online.observe(torch.zeros(3, 5, dtype=torch.float64))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_equal(online.importance(), estimate_importance(model, [inputs]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (lambda state, name=name: state.pop(name), "this is no state of an OnlineImportance")
            for name in ("sums", "num_taken", "num_seen", "weight", "made with")
        ),
        (lambda state: state.update(sums=[1]), "this is no state of an OnlineImportance"),
        (lambda state: state["made with"].clear(), "collected with another fingerprint"),
        (lambda state: state.update(num_taken=1.5), "'num_taken' of the state must be a whole number >= 0, got 1.5"),
        (lambda state: state.update(num_seen=-1), "'num_seen' of the state must be a whole number >= 0, got -1"),
        (lambda state: state.update(weight=float("nan")), "'weight' of the state must be a finite number, got nan"),
        (lambda state: state.update(weight=-1.0), "'weight' of the state must be >= 0, got -1.0"),
        (lambda state: state["sums"].popitem(), "the state is damaged: the sum of '3.bias' is missing"),
        (
            lambda state: state["sums"].update({"0.bias": torch.zeros(1)}),
            "the sum of '0.bias' is missing, .* another shape",
        ),
        (
            lambda state: state["sums"]["0.bias"].fill_(torch.nan),
            "the sum of '0.bias' is missing, negative, not finite",
        ),
        (lambda state: state["sums"]["0.bias"].fill_(-1), "the sum of '0.bias' is missing, negative, not finite"),
    ],
)
def test_damaged_states_are_one_sentence_and_change_nothing(change, message):
    model, inputs = build()
    online = OnlineImportance(model)
    online.observe(inputs)
    state = online.state_dict()
    change(state)
    other = OnlineImportance(model)
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)
    with pytest.raises(UserError, match="nothing was observed yet"):
        other.importance()
    with pytest.raises(UserError, match="this is no state of an OnlineImportance"):
        other.load_state_dict(None)
