"""The hardware and the library versions that a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_environment() -> dict[str, Any]:
    """The hardware, the number of threads and the versions of the main libraries, as values that JSON can hold."""
    packages = (
        "torch",
        "torchvision",
        "pytorch-metric-learning",
        "accelerate",
        "scikit-learn",
        "numpy",
        "faiss-gpu",
        "faiss-cpu",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "mas-embed": importlib.metadata.version("mas-embed"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
