import numpy as np
import pytest
import torch

from mas_embed import UserError
from mas_embed.training import Recipe


@pytest.mark.parametrize("name", ["epochs", "batch_size", "num_workers", "accumulate"])
def test_counts_are_whole_numbers(name):
    recipe = Recipe(**{name: np.int64(3)})
    assert type(getattr(recipe, name)) is int
    assert recipe == Recipe(**{name: 3})
    for value in (1.5, 2.0, True, np.True_, -1, float("nan"), "3", None, np.array([1, 2]), torch.tensor(1.0)):
        with pytest.raises(UserError, match=f"{name} must be a whole number >= [01], got"):
            Recipe(**{name: value})


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "sampler"])
def test_what_makes_a_component_must_be_callable(name):
    for value in ("Adam", 0.1, torch.optim.SGD([torch.zeros(1, requires_grad=True)])):
        with pytest.raises(UserError, match=f"{name} must be a function that makes one.*, got an object of type"):
            Recipe(**{name: value})
    if name == "optimizer":
        with pytest.raises(
            UserError, match="optimizer must be a function that makes one, got an object of type NoneType"
        ):
            Recipe(optimizer=None)


def test_the_largest_norm_is_a_positive_number():
    for value in (float("nan"), float("inf"), True, "1", 1j, 10**400):
        with pytest.raises(UserError, match="clip_norm must be a finite number, got"):
            Recipe(clip_norm=value)
    for value in (0, -0.5):
        with pytest.raises(UserError, match="clip_norm must be greater than 0, or None, got"):
            Recipe(clip_norm=value)
    assert Recipe(clip_norm=np.float32(0.5)).clip_norm == 0.5
