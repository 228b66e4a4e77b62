"""What methods share that train on items of earlier splits again, stored or drawn."""

from __future__ import annotations

import torch

from mas_embed.runtime.distributed import process_rank
from mas_embed.runtime.seeding import mixed_seed


def num_rehearsed(batch_size: int, share: float) -> int:
    """How many items to add to a batch, so that they are a `share` in [0, 1) of all that is trained on."""
    return round(batch_size * share / (1 - share))


def rehearsal_generator(seed: int, num_splits: int, num_draws: int) -> torch.Generator:
    """A generator for one draw, which depends on the method's seed, on where training stands, and on the process."""
    return torch.Generator().manual_seed(mixed_seed(seed, num_splits, num_draws, process_rank()))
