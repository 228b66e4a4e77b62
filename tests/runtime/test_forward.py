import pytest
import torch

from mas_embed import UserError
from mas_embed.runtime.forward import embed_batch, map_tensors


class ByKeyword(torch.nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class Whole(torch.nn.Module):
    def forward(self, features):
        return features["x"]


class AnyKeyword(torch.nn.Module):
    def forward(self, **inputs):
        assert "labels" not in inputs
        return inputs["x"]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (ByKeyword(), X),
        (ByKeyword(), (X, torch.zeros(2))),
        (ByKeyword(), {"x": X, "labels": torch.zeros(2)}),
        (ByKeyword(), {"x": X, "mask": torch.ones(2, 3), "other": 3}),
        (ByKeyword(), [{"x": X}, "labels"]),
        (Whole(), {"x": X}),
        (AnyKeyword(), {"x": X, "labels": torch.zeros(2)}),
    ],
)
def test_a_batch_reaches_the_model_as_it_takes_it(model, batch):
    assert torch.equal(embed_batch(model, batch), X)


def test_an_unknown_method_of_the_model():
    with pytest.raises(UserError, match="a ByKeyword, has no method 'raw'"):
        embed_batch(ByKeyword(), X, "raw")


def test_tensors_are_mapped_wherever_they_are():
    nest = {"a": [X, "text"], "b": (X, {"c": X}), "d": None}
    mapped = map_tensors(lambda tensor: tensor + 1, nest)
    assert torch.equal(mapped["b"][1]["c"], X + 1)
    assert mapped["a"][1] == "text"
    assert mapped["d"] is None
    assert torch.equal(nest["a"][0], X)
