"""Seconds and memory of calls, side by side in one process; shared by the benchmarks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def median_seconds(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a call, all ways in turn in every round, after one round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_index in range(rounds + 1):
        for name, call in ways.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if round_index:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_mebibytes(call: Callable[[], Any], device: torch.device) -> float:
    """Peak memory above what was in use before the call: of the process on a CPU, of torch's allocator on a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark of this process
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def resident_mebibytes() -> float:
    """Memory of this process, without that of its workers, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS") / 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _status(key: str) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
