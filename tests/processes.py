"""Runs a function in two processes that train together, as `accelerate launch` starts them, on the CPU."""

import os
import time
import warnings

import torch


def in_two_processes(function, folder, *arguments, number=2, waits=False):
    """Calls `function(rank, folder, *arguments)` in every process; they meet in a file of the folder.

    With `waits`, the other processes of one that has ended may go on for a while before they are ended, too.
    """
    context = torch.multiprocessing.spawn(
        _start, (number, function, str(folder), *arguments), nprocs=number, join=not waits
    )
    while waits and any(process.is_alive() for process in context.processes):
        time.sleep(0.02)
    while waits and not context.join():
        pass


def _start(rank, number, function, folder, *arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    function(rank, folder, *arguments)
    torch.distributed.destroy_process_group()
