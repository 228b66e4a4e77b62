"""Randomness that is passed: every random draw of a run comes from a seed that was given."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Runs its body with the generators of Python, NumPy and torch seeded from integers; restores their states after.

    The losses, miners and samplers of pytorch-metric-learning draw from these global generators. Several integers
    (a run's seed and a split's index, say) are mixed, so that neighbouring values give unrelated streams.
    """
    mixed = mixed_seed(*seed)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        random.seed(mixed)
        np.random.seed(mixed)
        torch.manual_seed(mixed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def mixed_seed(*seed: int) -> int:
    """One seed from several integers >= 0, such that neighbouring values give unrelated ones."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
