"""Sums over the processes of a `torch.distributed` group, the rank of a process, and where there must be one process only."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from mas_embed.errors import UserError


def check_one_process(num_processes: int | None = None) -> None:
    """Raises `UserError` for several processes.

    Args:
        num_processes: their number; None for what a launcher such as `accelerate launch` or `torchrun` says.
    """
    if num_processes is None:
        launched = os.environ.get("WORLD_SIZE", "")
        num_processes = int(launched) if launched.isdecimal() else 1
    if num_processes > 1:
        raise UserError(
            f"training in several processes, here {num_processes}, is not supported yet; start one process, without "
            "`accelerate launch` or `torchrun`"
        )


def sum_over_processes(sums: Mapping[str, Tensor], num_samples: int) -> int:
    """Adds up `sums` in place over all processes of the default group; returns the number of samples of all processes.

    Without a group, nothing changes and `num_samples` is returned. Every process of a group must call this function; a
    process without samples passes zeros.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return num_samples
    count = torch.tensor(num_samples, device=next(iter(sums.values())).device)
    for tensor in (count, *sums.values()):
        distributed.all_reduce(tensor)
    return int(count)


def process_rank() -> int:
    """The rank of this process in the default group; 0 without a group."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
