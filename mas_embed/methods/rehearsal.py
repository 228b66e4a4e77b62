"""Functions for methods that add items of earlier splits, stored or generated, to every batch."""

from __future__ import annotations

import torch

from mas_embed.runtime.distributed import is_batch_shared, process_rank
from mas_embed.runtime.seeding import mixed_seed


def num_rehearsed(batch_size: int, share: float) -> int:
    """The number of items to add to a batch, so that they make up a `share` in [0, 1) of the extended batch."""
    return round(batch_size * share / (1 - share))


def rehearsal_generator(seed: int, num_splits: int, num_draws: int) -> torch.Generator:
    """A random generator for one draw.

    Args:
        seed: of the method.
        num_splits: the number of splits that were learned before.
        num_draws: the number of draws before this one.

    Returns:
        A CPU generator that is seeded from the arguments. For a batch that several processes share, all of them draw alike, and
        each adds its share; otherwise the rank of the process enters the seed, so that processes draw differently.
    """
    rank = 0 if is_batch_shared() else process_rank()
    return torch.Generator().manual_seed(mixed_seed(seed, num_splits, num_draws, rank))
