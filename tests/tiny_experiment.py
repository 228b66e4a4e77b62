"""An experiment on the digits that takes a second, and how a test loads it."""

import json
import os
import signal
from pathlib import Path

import yaml

from mas_embed import DATASETS, METHODS, Method, Part, RunError, Split, digits, load_config


def few_digits(*, num_splits: int = 5, held_out: str = "test", seed: int = 0):
    """A third of the digits."""

    def thinned(part):
        return Part(part.inputs[::3], part.labels[::3], part.ids[::3])

    splits = []
    for split in digits(num_splits=num_splits, held_out=held_out, seed=seed):
        held = thinned(split.query)
        splits.append(Split(split.name, thinned(split.train), held, held))
    return splits


if "few_digits" not in DATASETS:  # pytest imports this file a second time, to look for doctests in it
    DATASETS.register("few_digits")(few_digits)


class Breaks(Method):
    """Fails in its third step, after the dry run, until a file is there."""

    def __init__(self, model, *, until: str, how: str = "sentence"):
        super().__init__(model)
        self.until, self.how, self._num_steps = until, how, 0

    def after_step(self, optimizer):
        self._num_steps += 1
        if self._num_steps < 3 or Path(self.until).exists():
            return
        if self.how == "sentence":
            raise RunError("it broke")
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("by zero")


if "breaks" not in METHODS:
    METHODS.register("breaks")(Breaks)

TINY = {
    "name": "tiny",
    "seeds": [0, 1],
    "data": {"name": "few_digits", "num_splits": 2},
    "model": {"name": "small_conv", "embedding_size": 4, "width": 2},
    "loss": {"name": "TripletMarginLoss"},
    "methods": ["finetune", "frozen", {"name": "mas", "strength": 10, "output": "projection"}, "joint"],
    "training": {"epochs": 1, "batch_size": 20, "sampler": {"name": "MPerClassSampler", "m": 4}},
}


def load_from(folder, values):
    """A config by way of a file in the folder."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "tiny.yaml")


def found_by(folder):
    """What a run has found out, without seconds; and its logs."""
    results = json.loads((folder / "results.json").read_text())
    for run in results["runs"]:
        del run["seconds"]
    logs = {path.relative_to(folder): path.read_text() for path in sorted(folder.rglob("*.jsonl"))}
    return results, logs
