"""The reference methods finetune, frozen and joint."""

import torch

from mas_embed import Finetune, Frozen, Joint, Method


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
