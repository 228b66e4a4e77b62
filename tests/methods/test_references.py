"""The reference methods finetune, frozen and joint."""

import pytest
import torch
from torch import nn

from mas_embed import MAS, SI, Combine, Finetune, Frozen, Joint, LwF, Method, UserError


def test_finetune_protects_nothing():
    model = torch.nn.Linear(2, 2)
    method = Finetune(model)
    assert method.is_learning
    assert method.consolidate([torch.zeros(1, 2)]) is None
    assert method.penalty().item() == 0
    method.add_penalty_grad()
    assert model.weight.grad is None
    method.load_state_dict(method.state_dict())


def test_only_joint_joins_the_splits():
    assert Joint(torch.nn.Linear(2, 2)).joins_splits
    assert not Finetune.joins_splits and not Method.joins_splits


def test_the_name_of_a_method_is_its_class_and_may_be_set():
    method = Joint(torch.nn.Linear(2, 2))
    assert method.name == "Joint"
    method.name = "upper reference"
    assert method.name == "upper reference"
    assert Joint(method.model).name == "Joint"


def test_frozen_learns_one_split_and_remembers_that_it_did():
    method = Frozen(torch.nn.Linear(2, 2))
    assert method.is_learning
    method.consolidate([])
    assert not method.is_learning
    resumed = Frozen(method.model)
    resumed.load_state_dict(method.state_dict())
    assert not resumed.is_learning


def with_batch_norm():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))


def train_a_step(model, method, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    model(torch.randn(8, 2)).square().sum().backward()
    optimizer.step()
    method.after_step(optimizer)
    optimizer.zero_grad()


def test_a_frozen_module_keeps_parameters_and_statistics_while_the_rest_learns():
    model = with_batch_norm()
    method = Frozen(model, only="0")
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    train_a_step(model, method, 0)
    assert not any(torch.equal(initial[name], value) for name, value in model.state_dict().items())
    method.consolidate([])
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    assert method.is_learning
    for seed in (1, 2):
        train_a_step(model, method, seed)
        same = {name for name, value in model.state_dict().items() if torch.equal(learned[name], value)}
        assert same == {name for name in learned if name.startswith("0.")}
    method.consolidate([])  # the values of the first split stay the ones that count
    train_a_step(model, method, 3)
    assert torch.equal(model[0][0].weight, learned["0.0.weight"])


def test_a_frozen_module_must_exist_and_its_state_must_fit():
    with pytest.raises(UserError, match=r"unknown module of the model 'trunk': .*\(known: 0, 0.0, 0.1, 1\)"):
        Frozen(with_batch_norm(), only="trunk")
    model = with_batch_norm()
    method = Frozen(model, only="0")
    method.consolidate([])
    with pytest.raises(UserError, match=r"the state holds '0.weight' of shape \[3, 2\], which '1' does not have"):
        Frozen(model, only="1").load_state_dict(method.state_dict())


def test_methods_say_whether_they_act_after_a_step():
    model = nn.Sequential(nn.Linear(2, 2))
    acting = {MAS(model, decoupled=True), SI(model), Frozen(model, only="0")}
    others = {MAS(model), Finetune(model), Frozen(model), LwF(model)}
    assert all(method.acts_after_step for method in acting)
    assert not any(method.acts_after_step for method in others)
    assert Combine(model, methods=[SI(model), LwF(model)]).acts_after_step
    assert not Combine(model, methods=[MAS(model), LwF(model)]).acts_after_step
