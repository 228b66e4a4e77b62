"""The directory of a run: made, resumed or replaced, and never overwritten unasked."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mas_embed.errors import UserError
from mas_embed.files import write_file

FILES = ("config.yaml", "environment.json", "results.json", "report.html", "scores.png", "old_index.png", "error.log")


def open_run_directory(
    out: Path, config_yaml: str, fresh: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, Any]:
    """Makes the directory, or takes it over.

    Args:
        out: the directory.
        config_yaml: the resolved config, written as `config.yaml`.
        fresh: `results.json` before anything has run.
        resume: go on with a run of the same config.
        overwrite: remove the run that is there.

    Returns:
        The results that are there already, or a copy of `fresh`.

    Raises:
        UserError: there is a run and neither flag, or one of another config; or the directory cannot be written.
    """
    if resume and overwrite:
        raise UserError("--resume keeps what is there and --overwrite replaces it; give one of them")
    exists = any((out / name).exists() for name in ("config.yaml", "results.json"))
    if exists and not (resume or overwrite):
        raise UserError(
            f"{out} holds a run already: pass --resume to go on with it, --overwrite to replace it, or another --out"
        )
    try:
        if exists and resume:
            return _results_to_resume(out, config_yaml, fresh)
        if exists:
            _remove_run(out)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "config.yaml", config_yaml)
        write_file(out / "environment.json", json.dumps(describe_environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot use {out} as a run directory: {error.strerror}; name another with --out") from None
    return dict(fresh)


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, atomically."""
    write_file(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")


def _results_to_resume(out: Path, config_yaml: str, fresh: Mapping[str, Any]) -> dict[str, Any]:
    config_path, results_path = out / "config.yaml", out / "results.json"
    if not config_path.exists() or config_path.read_text(encoding="utf-8") != config_yaml:
        raise UserError(f"{out} holds a run of another config, which this one cannot resume; compare {config_path}")
    if not results_path.exists():
        return dict(fresh)
    try:
        results = json.loads(results_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{results_path} is not valid JSON ({error}); start anew with --overwrite") from None
    if not isinstance(results, dict) or any(results.get(key) != fresh[key] for key in fresh if key != "runs"):
        raise UserError(f"{results_path} is not of this config; start anew with --overwrite")
    return results


def _remove_run(out: Path) -> None:
    """Removes what a run wrote, and nothing else."""
    for log in list(out.glob("*/seed*/log.jsonl")):
        for path in (log, log.with_name("checkpoint.safetensors")):
            path.unlink(missing_ok=True)
        for folder in (log.parent, log.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def describe_environment() -> dict[str, Any]:
    """The hardware and the versions that a figure was measured with."""
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
