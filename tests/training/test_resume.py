"""A training that is interrupted anywhere and resumed equals one that is not, bit for bit."""

import errno
import json
import os
import random
import signal
from contextlib import nullcontext
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
    Finetune,
    Frozen,
    LwF,
    Part,
    Replay,
    RetrievalEvaluator,
    Split,
    per_class_sampler,
)
from mas_embed.errors import RunError, UserError
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.output_folder import locked
from mas_embed.runtime.signals import exit_codes_of_signals
from mas_embed.training import CheckpointEvery, EpochLog, StepLog

EVERY_STEP = CheckpointEvery(steps=1)
SCORES = partial(RetrievalEvaluator, recall_at=(1,), follow_index=False)


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
    "everything combined": {"make_method": combined, "sampler": SAMPLER, "evaluator": RetrievalEvaluator},
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
        evaluator = options.pop("evaluator", SCORES)()
        logs = [EpochLog(folder / "log.jsonl"), StepLog(folder)]
        _, result = train(
            options.pop("make_method", MAS),
            model,
            make_splits(),
            callbacks=[*logs, *callbacks],
            evaluator=evaluator,
            **options,
            **made,
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
@pytest.mark.parametrize("steps", [(5, 9), pytest.param(range(1, 13), marks=pytest.mark.slow)], ids=["some", "all"])
def test_resumed_at_any_step_is_uninterrupted(tmp_path, name, steps):
    case = dict(CASES[name])
    straight = run(name, tmp_path, **case)
    num_steps = straight[1]["num_steps"]
    assert num_steps == 12
    for step in steps:
        folder = tmp_path / str(step)
        folder.mkdir()
        options = {**case, "checkpoint": folder / "c.safetensors", "checkpoint_every": EVERY_STEP}
        with pytest.raises(Stopped):
            run(name, folder, **options, callbacks=[StopAt(step)])
        rest = StopAt(-1)
        resumed = run(name, folder, **options, resume=True, seed=9, callbacks=[rest])
        assert_same(straight, resumed)
        assert num_steps - rest.num_seen >= step - case.get("accumulate", 1)  # few steps are repeated


def interrupted(folder, step, **options):
    """A training that was stopped at a step; returns its checkpoint and what it is resumed with."""
    path = folder / "c.safetensors"
    options = {"checkpoint": path, "checkpoint_every": EVERY_STEP, **options}
    with pytest.raises(Stopped):
        run("", folder, **options, callbacks=[StopAt(step)])
    return path, {**options, "resume": True, "seed": 9}


@pytest.mark.parametrize("damage", ["torn", "foreign", "newer", "missing"])
def test_the_checkpoint_before_the_last_takes_its_place(tmp_path, damage):
    straight = run("", tmp_path)
    (tmp_path / "run").mkdir()
    path, options = interrupted(tmp_path / "run", 8)
    tensors, description = read_tensors(path)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":  # the process ended when the file had its new name already, and the new file not yet
        path.unlink()
    else:
        write_tensors(path, tensors, description | ({"kind": "index"} if damage == "foreign" else {"version": 99}))
    warned = pytest.warns(UserWarning, match="goes on from the checkpoint before it, c-previous.safetensors")
    with nullcontext() if damage == "missing" else warned:
        assert_same(straight, run("", tmp_path / "run", **options))
    for name in ("c.safetensors", "c-previous.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match="the checkpoint cannot be used: .*c.safetensors .*; delete it to train this"):
        run("", tmp_path / "run", **options)


def test_a_full_disk_stops_with_the_checkpoints_before(tmp_path, monkeypatch):
    straight = run("", tmp_path)
    (tmp_path / "run").mkdir()
    path, options = interrupted(tmp_path / "run", 8)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        RunError, match="No space left on device; the checkpoint before it is kept, from which the training"
    ):
        run("", tmp_path / "run", **options)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    assert path.read_bytes() == before
    assert_same(straight, run("", tmp_path / "run", **options))


class SignalAt(Callback):
    """Sends this process signals at a step."""

    def __init__(self, step, *signals):
        self.step, self.signals, self.num_seen = step, signals, 0

    def on_step_end(self, event):
        self.num_seen += 1
        if self.num_seen == self.step:
            for number in self.signals:
                signal.raise_signal(number)


def test_a_signal_waits_for_the_end_of_the_step_which_is_stored(tmp_path):
    straight = run("", tmp_path)
    (tmp_path / "run").mkdir()
    options = {"checkpoint": tmp_path / "run" / "c.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        run("", tmp_path / "run", **options, callbacks=[SignalAt(4, signal.SIGINT)])
    _, description = read_tensors(options["checkpoint"])
    assert description["numbers"]["within_split/num_steps"] == 4
    with pytest.raises(SystemExit) as stop, exit_codes_of_signals():
        run("", tmp_path / "run", **options, resume=True, callbacks=[SignalAt(1, signal.SIGTERM)])
    assert stop.value.code == 143
    rest = StopAt(-1)
    assert_same(straight, run("", tmp_path / "run", **options, resume=True, seed=9, callbacks=[rest]))
    assert rest.num_seen == 12 - 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("", tmp_path, checkpoint=tmp_path / "c", callbacks=[SignalAt(4, signal.SIGINT, signal.SIGINT)])
    assert "within_split/num_steps" not in read_tensors(tmp_path / "c")[1]["numbers"]


class BadFrom:
    """A loss that is not finite from a step on."""

    def __init__(self, step):
        self.step, self.num_seen = step, 0

    def __call__(self, embeddings, labels, mined=None):
        self.num_seen += 1
        return embeddings.square().sum() * (1.0 if self.num_seen < self.step else float("inf"))


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before(tmp_path):
    options = {"loss": lambda: BadFrom(5), "checkpoint": tmp_path / "c"}
    for every, num_stored in ((EVERY_STEP, 4), (CheckpointEvery(steps=3), 3)):
        with pytest.raises(
            RunError, match="the loss is inf in split 's0', epoch 2, step 5: .*; the checkpoint before that is"
        ):
            run("", tmp_path, **options, checkpoint_every=every)
        assert read_tensors(tmp_path / "c")[1]["numbers"]["within_split/num_steps"] == num_stored
        (tmp_path / "c").unlink()
        (tmp_path / "c-previous").unlink()


def test_a_weight_that_is_not_finite_is_noticed(tmp_path):
    class Spoils(Callback):
        def on_step_end(self, event):
            if event.step == 2:
                with torch.no_grad():
                    model[2].weight[0, 0] = float("nan")

    model = small_model()

    def constant(embeddings, labels, mined=None):
        return 0 * model[0].weight.sum() + 1

    with pytest.raises(RunError, match="a weight is not finite in split 's0', epoch 1, step 3"):
        train(Finetune, model, small_splits(1), loss=constant, callbacks=[Spoils()])


def test_what_cannot_be_stored_is_told_and_the_split_starts_again(tmp_path):
    class WithIterator(BadFrom):
        def __init__(self):
            super().__init__(10**9)
            self.numbers = iter([])

        def __deepcopy__(self, memo):
            return WithIterator()

    options = {"loss": WithIterator, "checkpoint": tmp_path / "c", "checkpoint_every": EVERY_STEP}
    told = "no checkpoint is written within a split, .*: the loss: 'numbers' is an object of type list_iterator"
    with pytest.warns(UserWarning, match=told), pytest.raises(Stopped):
        run("", tmp_path, **options, callbacks=[StopAt(8)])
    rest = StopAt(-1)
    with pytest.warns(UserWarning, match=told):
        run("", tmp_path, **options, resume=True, callbacks=[rest])
    assert rest.num_seen == 6


def test_a_sampler_that_draws_otherwise_is_refused(tmp_path):
    class Unsteady:
        """It draws from the system, which no state can repeat."""

        def __init__(self, labels):
            self.size = len(labels)

        def __len__(self):
            return self.size

        def __iter__(self):
            return iter(random.SystemRandom().sample(range(self.size), self.size))

    _, options = interrupted(tmp_path, 3, sampler=Unsteady)
    with pytest.raises(UserError, match="the sampler has not drawn the order that it drew before"):
        run("", tmp_path, **options)


def test_a_second_process_is_refused_a_checkpoint(tmp_path):
    with (
        locked(tmp_path, name=".c.lock"),
        pytest.raises(UserError, match="another process is training with the checkpoint"),
    ):
        run("", tmp_path, checkpoint=tmp_path / "c")


def test_the_state_of_another_loss_is_refused(tmp_path):
    path, options = interrupted(tmp_path, 3)
    tensors, description = read_tensors(path)
    numbers = description["numbers"]
    write_tensors(path, tensors, description | {"numbers": numbers | {"within_split/loss/kind": "object"}})
    with pytest.raises(UserError, match="the loss: "):
        run("", tmp_path, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_process_that_loads_batches_and_dies_is_named(num_workers):
    class Deadly(Noisy):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.inputs[index]

    split = small_splits(1)[0]
    part = Part(split.train.inputs, split.train.labels, augmented=Deadly(split.train.inputs))
    splits = [Split("s", part, split.query, split.gallery)]
    expected = pytest.raises(
        RunError,
        match=r"a process that loads items (was killed|ended) in training on split 's' \(process .*num_workers, which is 2",
    )
    with expected if num_workers else nullcontext():
        train(splits=splits, num_workers=num_workers, epochs=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")])  # fmt: skip
def test_a_full_memory_says_what_to_lower(error):
    def full(embeddings, labels, mined=None):
        raise error

    with pytest.raises(
        RunError, match="the memory is full in training on split 's0' .*batch size, which is 4, and raise accum"
    ):
        train(loss=full)

    class Full(RetrievalEvaluator):
        def evaluate(self, model, splits, split_index):
            if split_index == 1:
                raise error
            return super().evaluate(model, splits, split_index)

    with pytest.raises(
        RunError, match="the memory is full in the evaluation at split 's1' .*lower the batch_size of the eval"
    ):
        train(evaluator=Full())
