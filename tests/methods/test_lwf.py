import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from mas_embed import LwF, UserError


def moved(**options):
    """A model that was the identity when the last split ended, and now scales the two directions by 2 and 1."""
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data.copy_(torch.eye(2))
    lwf = LwF(model, **options)
    lwf.consolidate([])
    model.weight.data.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    return model, lwf, torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()


def test_embedding_distance_by_hand():
    model, lwf, inputs = moved(strength=3.0)
    # now (2, 0) and (2, 1), before (1, 0) and (1, 1): squared distances 1 and 1
    value = lwf.batch_penalty(inputs, model(inputs))
    assert value.item() == pytest.approx(3.0)
    value.backward()
    # d/dW_00 of 3/2 sum_n (W x - y)^2: 3/2 * 2 * (1 + 1)
    assert model.weight.grad[0, 0].item() == pytest.approx(6.0)


def test_similarity_by_hand():
    model, lwf, inputs = moved(strength=3.0, distillation="similarity")
    # the cosine of the two was 1 / sqrt 2 and is 2 / sqrt 5; twice in a matrix of four
    expected = 3.0 * 2 * (2 / math.sqrt(5) - 1 / math.sqrt(2)) ** 2 / 4
    assert lwf.batch_penalty(inputs, model(inputs)).item() == pytest.approx(expected)


def test_a_rotation_changes_embeddings_but_not_similarities():
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    for distillation, is_free in (("similarity", True), ("embedding", False)):
        _, lwf, inputs = moved(distillation=distillation)
        value = lwf.batch_penalty(inputs, inputs @ rotation).item()
        assert (value < 1e-20) is is_free


def test_nothing_is_added_before_the_first_split_or_with_strength_zero():
    model, lwf, inputs = moved(strength=0.0)
    assert lwf.batch_penalty(inputs, model(inputs)) is None
    assert LwF(model).batch_penalty(inputs, model(inputs)) is None


def test_the_old_model_is_in_eval_mode_and_does_not_change():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    lwf = LwF(model)
    lwf.consolidate([])
    old = copy.deepcopy(model).eval()
    inputs = torch.randn(8, 2).double()
    model.train()
    state = torch.get_rng_state()
    values = [lwf.batch_penalty(inputs, torch.zeros(8, 3).double()).item() for _ in range(2)]
    assert values == pytest.approx([old(inputs).square().sum(1).mean().item()] * 2)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


@pytest.fixture
def bf16():
    """accelerate stores its precision globally for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_copy_of_a_prepared_model_is_not_the_model(bf16):
    """accelerate replaces the model's `forward` for mixed precision; the copy must not call that of the original."""
    model = nn.Linear(2, 2, bias=False)
    lwf = LwF(model)
    bf16.prepare_model(model)
    lwf.consolidate([])
    with torch.no_grad():
        model.weight.zero_()
    inputs = torch.randn(4, 2)
    assert lwf.batch_penalty(inputs, model(inputs)).item() > 0


def test_memory_is_one_copy_of_the_model_and_a_wrong_state_is_refused():
    model, lwf, _ = moved()
    assert lwf.num_bytes == 4 * 8
    assert LwF(model).num_bytes == 0
    with pytest.raises(UserError, match="the state is of another model: .*size mismatch"):
        LwF(nn.Linear(3, 2, bias=False)).load_state_dict(lwf.state_dict())
    with pytest.raises(UserError, match="lacks old; it is not a state of LwF"):
        lwf.load_state_dict({})
    with pytest.raises(UserError, match="distillation must be 'embedding' or 'similarity', got 'relation'"):
        LwF(model, distillation="relation")
    with pytest.raises(UserError, match="strength must be a finite number"):
        LwF(model, strength=-1.0)
