"""Two processes train as one does; the oracle is the training in one process, which other tests judge."""

import copy
import os
from functools import partial

import pytest
import torch
from processes import in_two_processes
from pytorch_metric_learning import losses, miners
from small import Recorder, pull_together, small_model, small_splits
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mas_embed import (
    EWC,
    IMM,
    MAS,
    SI,
    ClassStatistics,
    Combine,
    Finetune,
    LocalMAS,
    LwF,
    Part,
    Recipe,
    Replay,
    RetrievalEvaluator,
    Split,
    UserError,
    per_class_sampler,
    train_sequence,
)
from mas_embed.errors import RunError
from mas_embed.methods import Method
from mas_embed.training.processes import _check_batch_norm, synchronized_batch_norm

SMOOTH = losses.MultiSimilarityLoss()


class Draws(nn.Module):
    """Writes down random numbers that are drawn in its forward pass, as dropout draws them."""

    def __init__(self):
        super().__init__()
        self.layer, self.drawn = nn.Linear(2, 4), []

    def forward(self, inputs):
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return self.layer(inputs)


def proxies():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return losses.ProxyAnchorLoss(4, 4).double()


def cases():
    """By name the method and the options of a training; made anew in every process."""
    return {
        "finetune, every evaluation": (Finetune, {"evaluator": RetrievalEvaluator(batch_size=3, class_means=True)}),
        "mas": (partial(MAS, strength=5.0), {"miner": miners.TripletMarginMiner(margin=1.0), "loss": losses.TripletMarginLoss(margin=1.0)}),
        "si, a sampler": (SI, {"loss": SMOOTH, "sampler": partial(per_class_sampler, m=2)}),
        "a random loss": (LocalMAS, {"loss": losses.TripletMarginLoss(margin=1.0, triplets_per_anchor=2)}),
        "proxies": (Finetune, {"loss": proxies()}),
        "a memory": (Finetune, {"loss": losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, memory_size=16)}),
        "ewc": (partial(EWC, loss=SMOOTH), {}),
        "imm": (partial(IMM, mode="mode", loss=SMOOTH), {}),
        "lwf": (partial(LwF, strength=3.0), {}),
        "lwf, similarity": (partial(LwF, strength=3.0, distillation="similarity"), {}),
        "replay": (partial(Replay, buffer_size=7, share=0.3), {"loss": losses.TripletMarginLoss(margin=1.0, triplets_per_anchor=2)}),
        "class statistics": (partial(ClassStatistics, share=0.4), {}),
        "class statistics of a layer": (partial(ClassStatistics, layer="0", share=0.4), {}),
        "combined": (lambda model: Combine(model, methods=[MAS(model, strength=5.0), Replay(model, buffer_size=5)]), {}),
        "accumulated and clipped": (partial(MAS, strength=5.0), {"accumulate": 2, "clip_norm": 0.05}),
    }  # fmt: skip


def splits_of_nine():
    """Two splits in float64 whose batches of 4 end with one of a single item, which one of two processes does not have."""

    def part(given, num_items):
        return Part(given.inputs[:num_items].double(), given.labels[:num_items], given.ids[:num_items])

    splits = []
    for split in small_splits(2, per_class=5):
        held_out = part(split.query, 10)
        splits.append(Split(split.name, part(split.train, 9), held_out, held_out))
    return splits


def trained(make_method, options, splits=None, **others):
    options = copy.deepcopy(options)
    of_recipe = {
        name: options.pop(name) for name in ("sampler", "accumulate", "clip_norm", "batch_size") if name in options
    }
    model = small_model().double()
    method = make_method(model)
    result = train_sequence(
        model,
        splits or splits_of_nine(),
        method=method,
        recipe=Recipe(**{"epochs": 2, "batch_size": 4, "optimizer": partial(torch.optim.SGD, lr=0.05)} | of_recipe),
        **{"loss": pull_together, "evaluator": RetrievalEvaluator(batch_size=3, follow_index=False)} | options | others,
    )
    return {
        "weights": model.state_dict(),
        "importance": dict(getattr(method, "importance", {})),
        "scores": {name: torch.as_tensor(matrix.scores.copy()) for name, matrix in result.scores.items()},
        "initial": {name: torch.tensor(values) for name, values in result.initial.items()},
    }


def train_everything(rank, folder):
    result = {name: trained(*case) for name, case in cases().items()}
    result["refused"] = refusals(rank)
    recorder, path = Recorder(), f"{folder}/checkpoint.safetensors"
    trained(MAS, {}, callbacks=[recorder], checkpoint=path)
    result["events"] = len(recorder.events)
    result["resumed"] = trained(MAS, {}, callbacks=[recorder], checkpoint=path, resume=True)
    result["drawn"] = draws()
    torch.save(result, f"{folder}/{rank}.pt")


def refusals(rank):
    """What each refusal says, by name."""

    class Bends(Method):
        def batch_penalty(self, inputs, embeddings):
            return embeddings.mean()

    def batch_norm(model):
        model.append(nn.BatchNorm1d(4).double())
        return Finetune(model)

    attempts = {
        "batch size": (Finetune, {"batch_size": 5}, {}),
        "batch norm": (batch_norm, {}, {}),
        "hooks": (Bends, {}, {}),
        "data": (Finetune, {}, {"splits": splits_of_nine()[: 1 + rank]}),
        "seed": (Finetune, {}, {"seed": rank}),
    }
    said = {}
    for name, (make_method, options, others) in attempts.items():
        with pytest.raises(UserError) as caught:
            trained(make_method, options, **others)
        said[name] = str(caught.value)
    return said


def draws():
    """What the processes draw inside the model, and in a miner, in one epoch."""
    model, mined = Draws(), []

    def miner(embeddings, labels):
        mined.append(float(torch.rand(())))

    recipe = Recipe(epochs=1, batch_size=4)
    train_sequence(model, small_splits(1), method=Finetune(model), loss=pull_together, miner=miner, recipe=recipe)
    return model.drawn, mined


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes have found."""
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(train_everything, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", cases())
def test_two_processes_equal_one(name, results):
    expected = trained(*cases()[name])
    for result in results:
        torch.testing.assert_close(result[name], expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    moved = [torch.equal(value, small_model().double().state_dict()[key]) for key, value in expected["weights"].items()]
    assert not any(moved[:3])  # training has an effect; the last bias has none in a loss over distances


def test_the_first_process_is_listened_to_and_both_resume(results):
    assert [result["events"] for result in results] == [7, 0]
    for result in results:
        torch.testing.assert_close(result["resumed"]["weights"], trained(MAS, {})["weights"])


def test_processes_draw_alike_but_inside_the_model(results):
    (first, mined_first), (second, mined_second) = (result["drawn"] for result in results)
    assert mined_first == mined_second
    assert len({*first, *second}) == len(first) + len(second) == 6


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("batch size", "5 cannot be divided by 2 processes; take a multiple of 2"),
        ("batch norm", "the batch norm '3' would normalize by the items of one process alone on a CPU"),
        ("hooks", "Bends adds to the batches in training (batch_penalty) and does not say"),
        (
            "data",
            "the labels or the seed of process 1 differ from those of process 0; build the same splits in every process",
        ),
        ("seed", "the labels or the seed of process 1 differ from those of process 0"),
    ],
)
def test_what_cannot_be_exact_is_refused(name, sentence, results):
    assert all(sentence in result["refused"][name] for result in results)


class Dies(Recorder):
    def on_epoch_end(self, event):
        os._exit(9)


def lose_a_process(rank, folder):
    """The first process, whose callbacks are called, ends without a word."""
    with pytest.raises(RunError) as caught:
        trained(Finetune, {}, callbacks=[Dies()])
    torch.save(str(caught.value), f"{folder}/said.pt")


def test_a_lost_process_is_named(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        in_two_processes(lose_a_process, tmp_path, waits=True)
    assert "process 1 cannot go on, because process 0 of 2 has ended" in torch.load(tmp_path / "said.pt")


def test_batch_norms_are_synchronized_on_gpus_while_a_split_is_learned(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm2d(4))
    before, gpu = list(model.modules()), torch.device("cuda")
    monkeypatch.setattr("mas_embed.training.processes.num_processes", lambda: 2)
    _check_batch_norm(model, gpu)
    with synchronized_batch_norm(model, gpu):
        assert [type(one) for one in model.modules() if isinstance(one, _BatchNorm)] == [nn.SyncBatchNorm] * 2
        assert model[2].running_mean is before[-1].running_mean
        model.eval()
    assert all(map(lambda one, other: one is other, model.modules(), before))
    assert not any(module.training for module in before)
    with pytest.raises(
        UserError, match="the batch norm '0' would .* of a kind that torch cannot synchronize; freeze it"
    ):
        _check_batch_norm(nn.Sequential(type("Own", (nn.BatchNorm1d,), {})(4)), gpu)
    frozen = nn.BatchNorm1d(4).eval()
    frozen.train = lambda mode=True: frozen
    _check_batch_norm(nn.Sequential(frozen), torch.device("cpu"))
