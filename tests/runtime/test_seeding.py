import random

import numpy as np
import pytest
import torch

from mas_embed import UserError
from mas_embed.runtime.seeding import mixed_seed, seed_cpu, seeded, unchanged_generators


def test_seeded_repeats_and_restores():
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


@pytest.mark.parametrize("seed", [-1, 1.0, float("nan"), True, "1", None, torch.tensor(1.5), [1]])
def test_seeds_that_are_no_whole_numbers_are_refused(seed):
    with pytest.raises(UserError, match="seed must be a whole number >= 0, got"):
        mixed_seed(0, seed)
    with pytest.raises(UserError, match="seed must be a whole number >= 0, got"), seeded(seed):
        pass
    assert mixed_seed(np.int64(3), torch.tensor(4)) == mixed_seed(3, 4)


def test_generators_are_unchanged_after_an_error_too():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [random.random(), np.random.rand(), float(torch.rand(()))]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), unchanged_generators():
        seed_cpu(2**63 - 1)
        first = [random.random(), np.random.rand(), float(torch.rand(()))]
        seed_cpu(2**63 - 1)
        assert first == [random.random(), np.random.rand(), float(torch.rand(()))]
        1 / 0  # noqa: B018
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == expected
