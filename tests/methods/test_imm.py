import pytest
import torch
from torch import nn

from mas_embed import IMM, UserError


def squared_error(embeddings, labels, mined=None):
    return (embeddings[:, 0] - labels).square().mean()


def line():
    return nn.Linear(1, 1, bias=False).double()


def test_mean_by_hand_and_where_the_next_split_starts():
    model = line()
    imm = IMM(model)
    for value, average in ((1.0, 1.0), (3.0, 2.0), (8.0, 4.0)):
        model.weight.data.fill_(value)
        imm.consolidate([])
        assert model.weight.item() == pytest.approx(average)
        imm.begin_split()
        assert model.weight.item() == value


def test_a_split_may_start_from_the_average():
    model = line()
    imm = IMM(model, start="average")
    for value, average in ((1.0, 1.0), (3.0, 2.0)):
        model.weight.data.fill_(value)
        imm.consolidate([])
        imm.begin_split()
        assert model.weight.item() == average
    assert imm.last == {}


def test_mode_weights_by_fisher_information():
    """Squared gradients (2 (w x - y) x)^2: at w = 1 on (1, 2) 4, at w = 3 on (1, 2) 4 too, and on (2, 5) 16."""
    model = line()
    imm = IMM(model, mode="mode", loss=squared_error)
    for value, sample in ((1.0, (1.0, 2.0)), (3.0, (2.0, 5.0))):
        model.weight.data.fill_(value)
        imm.consolidate([(torch.tensor([[sample[0]]]).double(), torch.tensor([sample[1]]).double())])
    assert model.weight.item() == pytest.approx((4 * 1 + 16 * 3) / 20)


def test_where_no_split_has_fisher_information_the_last_parameters_stay():
    model = line()
    imm = IMM(model, mode="mode", loss=squared_error)
    for value in (1.0, 3.0):
        model.weight.data.fill_(value)
        with pytest.warns(UserWarning, match="Fisher information is zero"):
            imm.consolidate([(torch.tensor([[1.0]]).double(), torch.tensor([value]).double())])
    assert model.weight.item() == 3.0


def test_a_parameter_that_came_later_is_averaged_over_its_splits():
    model = nn.Sequential(line())
    imm = IMM(model)
    imm.consolidate([])
    model.append(line())
    for value in (2.0, 6.0):
        imm.begin_split()
        model[1].weight.data.fill_(value)
        imm.consolidate([])
    assert model[1].weight.item() == 4.0


def test_wrong_options_and_states():
    with pytest.raises(UserError, match="IMM with mode='mode' takes the gradient of the training loss; pass loss="):
        IMM(line(), mode="mode")
    with pytest.raises(UserError, match="mode must be 'mean' or 'mode', got 'median'"):
        IMM(line(), mode="median")
    with pytest.raises(UserError, match="start must be 'last' or 'average', got 'first'"):
        IMM(line(), start="first")
    imm = IMM(line())
    imm.consolidate([])
    with pytest.raises(UserError, match="'weight' has shape"):
        IMM(nn.Linear(2, 2, bias=False)).load_state_dict(imm.state_dict())
    with pytest.raises(UserError, match=r"needs batches of \(inputs, labels\)"):
        IMM(line(), mode="mode", loss=squared_error).consolidate([torch.zeros(1, 1).double()])
