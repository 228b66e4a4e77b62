"""Protected parameters that vanish, are replaced, or are no longer trained."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mas_embed import EWC, IMM, MAS, UserError, estimate_importance
from mas_embed.methods import ClassStatistics

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LORA = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def protected(model, **options):
    """MAS after a split, and the model moved away from its anchor."""
    mas = MAS(model, **options)
    mas.consolidate([INPUTS])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return mas


def warned(function):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in given]


def expected_penalty(mas, names):
    """By a plain loop."""
    parameters = dict(mas.model.named_parameters())
    terms = [mas.importance[name] * (parameters[name] - mas.anchor[name]) ** 2 for name in names]
    return sum(term.sum().item() for term in terms)


def test_parameters_that_vanished_are_named_once_and_the_others_are_pulled():
    model = network()
    mas = protected(model)
    model[2] = nn.Identity()
    with pytest.warns(
        UserWarning, match=r"MAS protects '2.weight', '2.bias', which the model no longer has.*consolidate"
    ):
        value = mas.penalty().item()
    assert value == pytest.approx(expected_penalty(mas, ["0.weight", "0.bias"]))
    assert warned(lambda: (mas.penalty(), mas.add_penalty_grad())) == []
    assert model[0].weight.grad.any()


def test_a_warning_lists_three_names():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    mas = protected(model)
    model[0] = model[1] = nn.Identity()
    with pytest.warns(UserWarning, match="'0.weight', '0.bias', '1.weight' and 1 more parameters, which"):
        mas.add_penalty_grad()


def test_every_form_of_the_penalty_notices():
    for call in ("penalty", "add_penalty_grad"):
        model = network()
        mas = protected(model)
        model[2] = nn.Identity()
        assert len(warned(getattr(mas, call))) == 1
    mas = protected(network(), decoupled=True)
    optimizer = torch.optim.SGD(mas.model.parameters(), lr=0.1)
    mas.model[2] = nn.Identity()
    assert len(warned(lambda: mas.after_step(optimizer))) == 1


def test_consolidating_protects_the_parameters_that_the_model_has_then():
    model = network()
    mas = protected(model)
    model[2] = nn.Sequential(nn.Linear(5, 3))
    assert len(warned(lambda: mas.consolidate([INPUTS]))) == 1
    assert mas.anchor.keys() == mas.importance.keys() == {"0.weight", "0.bias", "2.0.weight", "2.0.bias"}
    state = copy.deepcopy(mas.state_dict())
    again = MAS(model)
    assert warned(lambda: again.load_state_dict(state)) == []
    assert warned(mas.penalty) == []


def test_replaced_parameters_are_pulled_by_name_with_a_warning():
    model = network()
    mas = protected(model)
    model[2] = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match="MAS pulls '2.weight', '2.bias' to the values of other parameters"):
        value = mas.penalty().item()
    assert value == pytest.approx(expected_penalty(mas, mas.anchor), rel=1e-6)
    assert warned(mas.penalty) == []


def test_conversions_loads_and_copies_are_no_replacement():
    model = network()
    mas = protected(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.to(torch.float64)
    assert warned(mas.penalty) == []
    model.half()
    assert warned(mas.add_penalty_grad) == []
    model = network()
    mas = protected(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert warned(mas.penalty) == []
    both = copy.deepcopy((model, mas))
    assert warned(both[1].penalty) == []
    mas.model = copy.deepcopy(model)
    assert warned(mas.penalty) == []
    compiled = torch.compile(network(), backend="eager")
    mas = protected(compiled)
    assert warned(mas.penalty) == []


def test_a_model_whose_weights_are_assigned_is_protected_after_its_state_is_loaded():
    model = network()
    mas = protected(model)
    state, weights = copy.deepcopy(mas.state_dict()), copy.deepcopy(model.state_dict())
    twin = network()
    resumed = MAS(twin)
    twin.load_state_dict(weights, assign=True)
    resumed.load_state_dict(state)
    assert warned(resumed.penalty) == []
    assert resumed.penalty().item() == mas.penalty().item()


def test_freezing_some_or_the_whole_model_is_no_mistake():
    model = network()
    mas = protected(model)
    model[0].requires_grad_(False)
    assert warned(mas.penalty) == []
    model.requires_grad_(False)
    assert warned(mas.penalty) == []
    model.requires_grad_(True)
    assert warned(mas.penalty) == []


def test_freezing_everything_protected_while_others_are_trained_warns_once():
    model = network()
    mas = protected(model)
    model.requires_grad_(False)
    model.append(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="MAS pulls nothing, because '0.weight', '0.bias', '2.weight' and 1 more"):
        mas.add_penalty_grad()
    assert warned(mas.penalty) == []


def test_nothing_is_said_before_the_first_split_or_without_strength():
    model = network()
    mas = MAS(model)
    model[2] = nn.Linear(5, 3)
    assert warned(mas.penalty) == []
    mas = protected(model, strength=0.0)
    model[2] = nn.Identity()
    assert warned(mas.penalty) == []


def test_a_new_shape_is_still_an_error():
    model = network()
    mas = protected(model)
    model[2] = nn.Linear(5, 7)
    for call in (mas.penalty, mas.add_penalty_grad, lambda: mas.consolidate([INPUTS])):
        with pytest.raises(UserError, match="'2.weight' has shape"):
            call()


def test_its_own_state_does_not_hide_a_replacement():
    """Trainers load the state of a method into itself, which moves it to the device of the model."""
    model = network()
    mas = protected(model)
    model[2] = nn.Linear(5, 3)
    mas.load_state_dict(mas.state_dict())
    assert len(warned(mas.penalty)) == 1


def adapted(seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(network(), LORA)
    return model, protected(model)


def test_only_the_adapter_is_protected_and_exactly():
    model, mas = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert mas.anchor.keys() == trained and all("lora_" in name for name in trained)
    expected = estimate_importance(model, [INPUTS])
    mas.consolidate([INPUTS])
    assert expected.keys() == trained


def test_another_active_adapter_warns_and_the_first_one_is_pulled_again_when_it_is_active():
    model, mas = adapted()
    before = mas.penalty().item()
    assert before > 0
    model.add_adapter("second", LORA)
    model.set_adapter("second")
    with pytest.warns(
        UserWarning, match=r"MAS pulls nothing, because .*lora_A.default.weight.* with another adapter active"
    ):
        assert mas.penalty().item() == 0
    model.set_adapter("default")
    assert warned(mas.penalty) == []
    assert mas.penalty().item() == before
    model.set_adapter("second")
    assert warned(lambda: mas.consolidate([INPUTS])) == []
    assert any("second" in name for name in mas.anchor)


def test_a_merged_adapter_warns_and_so_does_a_new_one_of_the_same_name():
    model, mas = adapted()
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    with pytest.warns(
        UserWarning, match=r"lora_A.default.weight.*which the model no longer has, as after an adapter was merged"
    ):
        assert mas.penalty().item() == 0
    model, mas = adapted()
    get_peft_model(model.merge_and_unload(), LORA)
    with pytest.warns(
        UserWarning, match=r"to the values of other parameters .* as with a new adapter, make the method anew"
    ):
        mas.penalty()


def test_ewc_notices_too():
    model = network()
    ewc = EWC(model, loss=lambda embeddings, labels, mined: embeddings.square().mean())
    ewc.consolidate([(INPUTS, torch.arange(6))])
    model[2] = nn.Identity()
    assert warned(ewc.penalty)[0].startswith("EWC protects '2.weight'")


def test_methods_that_write_parameters_name_one_that_vanished():
    model = network()
    imm = IMM(model)
    imm.consolidate([])
    statistics = ClassStatistics(model, layer="1")
    statistics.consolidate([(INPUTS, torch.arange(6) % 2)])
    model[0] = nn.Identity()
    for call in (imm.begin_split, lambda: statistics.after_step(torch.optim.SGD(model.parameters()))):
        with pytest.raises(UserError, match=r"the model no longer has the parameter '0.(weight|bias)'"):
            call()
