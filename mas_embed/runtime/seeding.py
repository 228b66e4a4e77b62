"""Seeds for the global random generators, and seeds that are mixed from several integers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch for the body of the `with` statement; restores them afterwards.

    The losses, miners and samplers of pytorch-metric-learning draw from these global generators. Several integers, such as
    a run's seed and a split's index, are mixed, so that neighbouring values give unrelated random streams.
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
    """One seed from several integers >= 0; neighbouring integers give unrelated seeds."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
