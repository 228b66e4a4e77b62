import pytest
import torch
from torch import nn

from mas_embed import LocalMAS, UserError


def test_importance_is_input_times_output_by_hand():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    method = LocalMAS(model, strength=10.0)
    method.consolidate([torch.tensor([[1.0, 1.0], [1.0, -1.0]])])  # y is 3 and relu(-1) = 0
    assert method.importance["weight"].tolist() == [[1.5, 1.5]]
    model.weight.data.copy_(torch.tensor([[2.0, 2.0]]))
    assert method.penalty().item() == pytest.approx(10 * 1.5)


def test_layers_without_local_importance_are_free():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    method = LocalMAS(model)
    method.consolidate([torch.randn(4, 2)])
    assert method.anchor.keys() == {"0.weight", "0.bias"}
    with pytest.raises(UserError, match="no trainable linear layer or convolution"):
        LocalMAS(nn.LayerNorm(2)).consolidate([torch.randn(4, 2)])
