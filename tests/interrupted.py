"""An experiment of everything that a checkpoint within a split must hold, with components that tests register."""

from pathlib import Path

import torch
from tiny_experiment import TINY

from mas_embed import CALLBACKS, Callback
from mas_embed.losses import MINERS


class RememberingMiner:
    """Leaves out the class that it has seen most often so far."""

    def __init__(self):
        self.counts, self.num_calls, self.history = {}, 0, []

    def __call__(self, embeddings, labels):
        for label in labels.tolist():
            self.counts[label] = self.counts.get(label, 0) + 1
        self.num_calls += 1
        self.history = [*self.history[-3:], embeddings.detach().mean(0)]
        common = max(self.counts, key=lambda label: (self.counts[label], label))
        anchors, positives, negatives = torch.meshgrid(*[torch.arange(len(labels))] * 3, indexing="ij")
        keep = (labels[anchors] == labels[positives]) & (labels[anchors] != labels[negatives]) & (anchors != positives)
        keep &= (labels[anchors] != common) | (self.num_calls % 2 == 0) | (self.history[0].sum() > 1e9)
        return anchors[keep], positives[keep], negatives[keep]


class CountSteps(Callback):
    """Writes a byte for every step that was trained, also for one that is repeated."""

    def __init__(self, folder):
        self.path = Path(folder).parent.parent / "count"

    def on_step_end(self, event):
        with self.path.open("ab") as file:
            file.write(b".")


if "remembering" not in MINERS:
    MINERS.register("remembering")(RememberingMiner)
    CALLBACKS.register("count_steps")(CountSteps)

EVERYTHING = TINY | {
    "seeds": [0],
    "transforms": {"augment": [{"name": "RandomCrop", "padding": 1}]},
    "methods": [
        "si",
        {"name": "ewc", "mode": "online"},
        {"name": "combine", "methods": ["mas", {"name": "lwf", "strength": 0.1}, {"name": "replay", "buffer_size": 20}]},
        "class_statistics",
    ],
    "model": TINY["model"] | {"is_normalized": False},
    "training": TINY["training"] | {
        "epochs": 2,
        "miner": "remembering",
        "optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9},
        "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 0.5},
        "accumulate": 2,
        "clip_norm": 1.0,
        "checkpoint_every": {"steps": 3},
    },
    "callbacks": ["step_log", "count_steps"],
    "evaluation": {"follow_index": True},
}  # fmt: skip
