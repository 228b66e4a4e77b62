import pytest
import torch

from mas_embed import UserError
from mas_embed.runtime.forward import embed_batch, map_tensors
from mas_embed.runtime.modes import eval_mode
from mas_embed.registry import Registry
from mas_embed.runtime.seeding import seeded


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


def test_an_unknown_method_to_embed_with():
    with pytest.raises(UserError, match="a ByKeyword, has no method 'raw'"):
        embed_batch(ByKeyword(), X, "raw")


def test_tensors_are_mapped_wherever_they_are():
    nest = {"a": [X, "text"], "b": (X, {"c": X}), "d": None}
    mapped = map_tensors(lambda tensor: tensor + 1, nest)
    assert torch.equal(mapped["b"][1]["c"], X + 1)
    assert mapped["a"][1] == "text"
    assert mapped["d"] is None
    assert torch.equal(nest["a"][0], X)


def test_modes_are_restored_one_by_one_after_an_exception():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_seeded_repeats_and_restores():
    import random

    import numpy as np

    def draw():
        return torch.rand(1).item(), np.random.random(), random.random()

    def draw_seeded(*seed):
        with seeded(*seed):
            return draw()

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    plain = draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    one, two, other = draw_seeded(1, 2), draw_seeded(1, 2), draw_seeded(2, 1)
    assert one == two != other
    assert draw() == plain


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="thing 'a' is registered already, as int"):
        registry.register("a")(float)
    with pytest.raises(UserError, match="unknown thing 'b'"):
        registry["b"]
    assert (list(registry), len(registry), "a" in registry) == (["a"], 1, True)
