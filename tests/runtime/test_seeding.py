import random

import numpy as np
import torch

from mas_embed.runtime.seeding import seeded


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
