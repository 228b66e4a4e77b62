"""The lines that the page on plain loops adds, against loops that add the penalty to the loss by hand."""

import pytest
import torch
from torch import nn

import mas_embed as me

STRENGTH, NUM_STEPS = 2.0, 6


def make_model():
    with me.seeded(0):
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def make_splits():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, NUM_STEPS, 8, 3, generator=generator)
    return [[(batch, torch.arange(8) % 4) for batch in split] for split in inputs]


def loss_fn(embeddings, labels):
    return nn.functional.cross_entropy(embeddings, labels)


def loop_by_hand(*, clip=None, accumulate=1):
    """Every penalty is written out and added to the mean loss over all samples of a step."""
    model, anchor, importance = make_model(), [], []
    for split in make_splits():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for first in range(0, NUM_STEPS, accumulate):
            batches = split[first : first + accumulate]
            total = sum(loss_fn(model(inputs), labels) for inputs, labels in batches) / accumulate
            for parameter, old, weight in zip(model.parameters(), anchor, importance, strict=bool(anchor)):
                total = total + STRENGTH * (weight * (parameter - old) ** 2).sum()
                if not anchor:
                    break
            optimizer.zero_grad()
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        importance = importance_by_hand(model, torch.cat([inputs for inputs, _ in split]))
        anchor = [parameter.detach().clone() for parameter in model.parameters()]
    return model


def importance_by_hand(model, samples):
    """The mean absolute gradient of the squared norm of the embedding, one sample at a time."""
    totals = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for sample in samples:
        gradients = torch.autograd.grad((model(sample[None]) ** 2).sum(), list(model.parameters()))
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.abs() / len(samples)
    return totals


def step(model, mas, optimizer, batches, *, form, clip, scaler):
    """One step of the optimizer, as on the page."""
    optimizer.zero_grad()
    for inputs, labels in batches:
        value = loss_fn(model(inputs), labels)
        if form == "loss":
            value = value + mas.penalty()
        value = value / len(batches)
        (value if scaler is None else scaler.scale(value)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    if form == "gradient":
        mas.add_penalty_grad()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def loop(*, form, strength=STRENGTH, clip=None, accumulate=1, scaler=None):
    model = make_model()
    mas = me.MAS(model, strength=strength)
    for split in make_splits():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for first in range(0, NUM_STEPS, accumulate):
            step(model, mas, optimizer, split[first : first + accumulate], form=form, clip=clip, scaler=scaler)
        mas.consolidate(split)
    return model


def assert_equal(model, expected, **tolerance):
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("uses_scaler", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.1, 1), (None, 3), (0.1, 2)])
@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_the_three_lines_equal_a_loop_by_hand(form, clip, accumulate, uses_scaler):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if uses_scaler else None
    model = loop(form=form, clip=clip, accumulate=accumulate, scaler=scaler)
    assert_equal(model, loop_by_hand(clip=clip, accumulate=accumulate))
    with pytest.raises(AssertionError):  # the penalty has an effect
        assert_equal(model, loop(form=form, strength=0, clip=clip, accumulate=accumulate))


def test_strength_0_trains_bit_for_bit_like_no_method():
    class Nothing:
        def add_penalty_grad(self):
            pass

    expected = make_model()
    for split in make_splits():
        optimizer = torch.optim.Adam(expected.parameters(), lr=0.05)
        for batch in split:
            step(expected, Nothing(), optimizer, [batch], form="gradient", clip=None, scaler=None)
    assert_equal(loop(form="gradient", strength=0), expected, rtol=0, atol=0)


def test_a_resumed_loop_equals_an_uninterrupted_one(tmp_path):
    models = []
    for is_resumed in (False, True):
        model = make_model()
        mas = me.MAS(model, strength=STRENGTH)
        for index, split in enumerate(make_splits()):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            for batch in split:
                step(model, mas, optimizer, [batch], form="gradient", clip=None, scaler=None)
            if index == 0:
                mas.consolidate(split)
                torch.save({"model": model.state_dict(), "method": mas.state_dict()}, tmp_path / "state.pt")
                if is_resumed:
                    state = torch.load(tmp_path / "state.pt")
                    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
                    model.load_state_dict(state["model"])
                    mas = me.MAS(model, strength=STRENGTH)
                    mas.load_state_dict(state["method"])
        models.append(model)
    assert_equal(*models, rtol=0, atol=0)


def train_process(rank, folder):
    """Both forms on every second sample, with `DistributedDataParallel`; the penalty is that of the model inside."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for form in ("loss", "gradient"):
        model = make_model()
        mas, parallel = me.MAS(model, strength=STRENGTH), nn.parallel.DistributedDataParallel(model)
        for split in make_splits():
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            own = [(inputs[rank::2], labels[rank::2]) for inputs, labels in split]
            for batch in own:
                step(parallel, mas, optimizer, [batch], form=form, clip=0.1, scaler=None)
            mas.consolidate(own)
        torch.save(model.state_dict(), f"{folder}/{form}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(train_process, (str(tmp_path),), nprocs=2)
    expected = loop_by_hand(clip=0.1)
    for name in ("loss0", "loss1", "gradient0", "gradient1"):
        model = make_model()
        model.load_state_dict(torch.load(tmp_path / f"{name}.pt"))
        assert_equal(model, expected)
