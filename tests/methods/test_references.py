"""Finetune and frozen."""

import torch

from mas_embed import Finetune, Frozen
from mas_embed.methods import METHODS


def test_finetune_protects_nothing():
    model = torch.nn.Linear(2, 2)
    method = Finetune(model)
    assert method.is_learning
    assert method.consolidate([torch.zeros(1, 2)]) is None
    assert method.penalty().item() == 0
    method.add_penalty_grad()
    assert model.weight.grad is None
    method.load_state_dict(method.state_dict())


def test_joint_is_finetune_on_another_sequence():
    assert METHODS["joint"] is METHODS["finetune"] is Finetune


def test_frozen_learns_one_split_and_remembers_that_it_did():
    method = Frozen(torch.nn.Linear(2, 2))
    assert method.is_learning
    method.consolidate([])
    assert not method.is_learning
    resumed = Frozen(torch.nn.Linear(2, 2))
    resumed.load_state_dict(method.state_dict())
    assert not resumed.is_learning
