"""A training that is interrupted anywhere and resumed equals one that is not, bit for bit."""

import json
from functools import partial

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, ProxyNCALoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from small import Stopped, small_model, small_splits, train
from torch import nn

from mas_embed import (
    EWC,
    IMM,
    MAS,
    SI,
    Callback,
    ClassStatistics,
    Combine,
    Frozen,
    LwF,
    Part,
    Replay,
    Split,
    per_class_sampler,
)
from mas_embed.training import CheckpointEvery, EpochLog, StepLog

EVERY_STEP = CheckpointEvery(steps=1)


@pytest.fixture(autouse=True)
def writes_without_waiting_for_the_disk(monkeypatch):
    """No test here pulls the plug."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class StopAt(Callback):
    """Stops at the n-th step of all splits, which it has been told n times."""

    def __init__(self, step):
        self.step, self.num_seen = step, 0

    def on_step_end(self, event):
        self.num_seen += 1
        if self.num_seen == self.step:
            raise Stopped


def with_dropout(seed=0):
    """A model that draws at random in training, and has running statistics."""
    first, tanh, last = small_model(seed)
    return nn.Sequential(first, nn.BatchNorm1d(8), tanh, nn.Dropout(0.3), last)


class Noisy:
    """Inputs that are changed at random each time they are indexed."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + 0.1 * torch.randn(2)


def augmented_splits():
    return [
        Split(s.name, Part(s.train.inputs, s.train.labels, s.train.ids, Noisy(s.train.inputs)), s.query, s.gallery)
        for s in small_splits(2)
    ]


def combined(model):
    return Combine(model, methods=[SI(model), Replay(model, buffer_size=6), LwF(model, strength=0.1), MAS(model)])


# 12 items a split in batches of 4, of 2 epochs, are 6 steps; the sampler shuffles its own list of classes from epoch to epoch
SAMPLER = partial(per_class_sampler, m=2)
CASES = {
    "si and dropout": {"make_method": SI, "make_model": with_dropout},
    "everything combined": {"make_method": combined, "sampler": SAMPLER},
    "ewc online": {"make_method": partial(EWC, loss=ContrastiveLoss(), mode="online"), "sampler": SAMPLER},
    "class statistics": {"make_method": partial(ClassStatistics, layer="0")},
    "imm": {"make_method": IMM},
    "frozen layer": {"make_method": partial(Frozen, only="0")},
    "decoupled": {"make_method": partial(MAS, decoupled=True, normalize=True)},
    "accumulated gradients": {"accumulate": 2, "clip_norm": 0.5},
    "scheduler": {
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    },
    "proxies": {"loss": partial(ProxyNCALoss, num_classes=6, embedding_size=4)},
    "memory": {
        "loss": lambda: CrossBatchMemory(ContrastiveLoss(), 4, memory_size=8),
        "sampler": SAMPLER,
    },
    "miner": {"loss": TripletMarginLoss, "miner": TripletMarginMiner(), "sampler": SAMPLER},
    "augmentation": {"make_method": MAS, "make_splits": augmented_splits},
}


def run(case, folder, *, seed=0, make_model=small_model, make_splits=lambda: small_splits(2), callbacks=(), **options):
    """Trains a case with logs in the folder; returns the weights, the result without its seconds, and the logs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = {"loss": options.pop("loss")()} if "loss" in options else {}
        model = make_model(seed)
        logs = [EpochLog(folder / "log.jsonl"), StepLog(folder)]
        _, result = train(
            options.pop("make_method", MAS), model, make_splits(), callbacks=[*logs, *callbacks], **options, **made
        )
    result.seconds = {}
    lines = [
        json.loads(line) for name in ("log.jsonl", "steps.jsonl") for line in (folder / name).read_text().splitlines()
    ]
    return [value.clone() for value in model.state_dict().values()], vars(result), lines


def assert_same(one, two):
    assert all(map(torch.equal, one[0], two[0]))
    assert {name: str(value) for name, value in one[1].items()} == {name: str(value) for name, value in two[1].items()}
    assert one[2] == two[2]


@pytest.mark.parametrize("name", CASES)
def test_resumed_at_any_step_is_uninterrupted(tmp_path, name):
    case = dict(CASES[name])
    torch.manual_seed(5)
    straight = run(name, tmp_path, **case)
    num_steps = straight[1]["num_steps"]
    for step in range(1, num_steps + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        options = {**case, "checkpoint": folder / "c.safetensors", "checkpoint_every": EVERY_STEP}
        with pytest.raises(Stopped):
            run(name, folder, **options, callbacks=[StopAt(step)])
        rest = StopAt(-1)
        resumed = run(name, folder, **options, resume=True, seed=9, callbacks=[rest])
        assert_same(straight, resumed)
        assert num_steps - rest.num_seen >= step - case.get("accumulate", 1)  # few steps are repeated
