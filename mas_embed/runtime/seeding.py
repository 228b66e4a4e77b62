"""Seeds for the global random generators, and seeds that are mixed from several integers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mas_embed.runtime.checks import as_whole_number

LARGEST_SEED = 2**63 - 1  # of a `torch.Generator`


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and torch for the body of the `with` statement; restores them afterwards.

    The losses, miners and samplers of pytorch-metric-learning draw from these global generators. Several integers, such as
    a run's seed and a split's index, are mixed, so that neighbouring values give unrelated random streams.

    Raises:
        UserError: a seed is not a whole number >= 0.
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


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch on the CPU; leaves those of GPUs, as a worker process must."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_cpu(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch on the CPU; takes microseconds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs, too


def mixed_seed(*seed: int) -> int:
    """One seed from several integers; neighbouring integers give unrelated seeds.

    Raises:
        UserError: one of them is not a whole number >= 0.
    """
    integers = [as_whole_number("seed", integer, 0) for integer in seed]
    return int(np.random.SeedSequence(integers).generate_state(1)[0])


def random_state() -> dict[str, Tensor]:
    """The states of the global generators of Python, NumPy and torch, as tensors that always have the same shapes.

    The integers of Python's and NumPy's generators are exact in float64.
    """
    _, numbers, python_gauss = random.getstate()
    _, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*numbers, python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss, numpy_gauss], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Sets the global generators to the result of `random_state`; that of a GPU only where there is one."""
    *numbers, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(map(int, numbers)), gauss if has_gauss else None))
    *keys, position, has_gauss, gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"].cpu().clone())  # which must be aligned, as a row of a file may not be
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu().clone())
