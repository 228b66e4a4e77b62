"""Methods on a GPU: training, penalties and states, compared with those on the CPU."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small import Recorder, Stopped, small_model, small_splits, train
from torch import nn

from mas_embed import (
    EWC,
    IMM,
    MAS,
    METHODS,
    SI,
    ClassStatistics,
    Combine,
    Finetune,
    LocalMAS,
    LwF,
    Recipe,
    Replay,
    RetrievalEvaluator,
    train_sequence,
)
from mas_embed.testing import loss
from mas_embed.training import SplitEnd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FACTORIES = {
    **{name: method for name, method in METHODS.items() if method.__module__.startswith("mas_embed.")},
    "ewc": partial(EWC, loss=loss),
    "ewc of batches": partial(EWC, loss=loss, fisher="batch"),
    "imm by Fisher": partial(IMM, mode="mode", loss=loss),
    "lwf of similarities": partial(LwF, distillation="similarity"),
    "mas decoupled": partial(MAS, decoupled=True),
    "mas normalized": partial(MAS, normalize=True),
    "mas of projections": partial(MAS, output="projection"),
    "class_statistics of a layer": partial(ClassStatistics, layer="1", rank=1),
    "combine": lambda model: Combine(model, methods=[SI(model), ClassStatistics(model, layer="0"), LwF(model)]),
    "combine mas and replay": lambda model: Combine(model, methods=[MAS(model), Replay(model)]),
}
ELASTIC = {
    "mas": MAS,
    "local_mas": LocalMAS,
    "ewc": partial(EWC, loss=loss),
    "si": SI,
    "mas normalized": partial(MAS, normalize=True),
}


def on_cpu(factory, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    trained = train(factory, accelerator=Accelerator(cpu=True), splits=small_splits(2), **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained


def on_gpu(factory, **options):
    return train(factory, splits=small_splits(2), **options)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_a_sequence_ends_where_it_does_on_the_cpu(factory):
    expected, expected_result = on_cpu(factory)
    model, result = on_gpu(factory)
    assert next(model.parameters()).is_cuda
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].cpu(), value, rtol=2e-2, atol=2e-3, msg=name)
    for name, scores in result.scores.items():
        torch.testing.assert_close(
            torch.tensor(scores.scores), torch.tensor(expected_result.scores[name].scores), rtol=0, atol=0.1
        )


def consolidated(factory, device):
    """A method after one split and some steps away from its anchor, with a batch."""
    model = small_model().to(device)
    method = factory(model)
    inputs, labels = (part.to(device) for part in (small_splits()[0].train.inputs, small_splits()[0].train.labels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        method.add_penalty_grad()
        optimizer.step()
        method.after_step(optimizer)
    method.consolidate([(inputs, labels)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
    optimizer.zero_grad()
    return model, method, (inputs, labels)


@pytest.mark.parametrize("factory", ELASTIC.values(), ids=ELASTIC.keys())
def test_the_penalty_is_that_of_the_cpu(factory):
    model, method, _ = consolidated(factory, "cuda")
    expected_model, expected, _ = consolidated(factory, "cpu")
    assert method.penalty().is_cuda
    torch.testing.assert_close(method.penalty().cpu(), expected.penalty(), rtol=1e-3, atol=1e-6)
    method.add_penalty_grad()
    expected.add_penalty_grad()
    for parameter, other in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), other.grad, rtol=1e-3, atol=1e-5)
    added = [parameter.grad.clone() for parameter in model.parameters()]
    for gradient, other in zip(torch.autograd.grad(method.penalty(), list(model.parameters())), added, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_a_state_moves_between_devices(factory):
    model, method, (inputs, labels) = consolidated(factory, "cuda")
    other_model = copy.deepcopy(model).cpu()
    other = factory(other_model)
    other.load_state_dict(method.state_dict())
    back = factory(model)
    back.load_state_dict(other.state_dict())
    states = [flat(part.state_dict()) for part in (method, other, back)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for name, value in states[0].items():
        for state in states[1:]:
            assert torch.equal(value.cpu(), state[name].cpu()) if torch.is_tensor(value) else value == state[name]
    for part, device in ((other, "cpu"), (back, "cuda")):
        batch, batch_labels = part.extend_batch(inputs.to(device), labels.to(device))
        embeddings = part.model(batch)
        part.batch_penalty(batch, embeddings)
        embeddings, batch_labels = part.extend_embeddings(embeddings, batch_labels)
        assert embeddings.device.type == batch_labels.device.type == device
        loss(embeddings, batch_labels).backward()
        part.add_penalty_grad()
        part.consolidate([(inputs, labels)])


def flat(state, prefix=""):
    result = {}
    for key, value in state.items():
        result |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_a_method_of_the_cpu_goes_on_on_the_gpu(factory):
    """`train_sequence` moves the model, and what the method stores must follow."""
    model, method, _ = consolidated(factory, "cpu")
    if method.is_learning:
        train_sequence(
            model,
            small_splits(2),
            method=method,
            loss=loss,
            recipe=Recipe(epochs=1, batch_size=4),
            evaluator=RetrievalEvaluator(recall_at=(1,)),
        )
        assert next(model.parameters()).is_cuda


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_a_checkpoint_resumes_on_the_gpu(factory, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    uninterrupted, _ = train(factory)
    stop = Recorder(lambda event: isinstance(event, SplitEnd) and event.split_index == 1)
    with pytest.raises(Stopped):
        train(factory, checkpoint=path, callbacks=[stop])
    resumed, _ = train(factory, model=small_model(seed=5), checkpoint=path, resume=True)
    for value, other in zip(uninterrupted.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["finetune", "mas", "mas decoupled", "ewc", "si", "lwf", "replay", "combine"])
def test_mixed_precision(precision, name):
    expected, _ = on_gpu(FACTORIES[name])
    AcceleratorState._reset_state(reset_partial_state=True)
    model, _ = on_gpu(FACTORIES[name], accelerator=Accelerator(mixed_precision=precision))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    for value, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0.3, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mas_with_a_gradient_scaler_and_autocast(dtype):
    """The steps of a plain loop in mixed precision; a step with infinite gradients is skipped."""

    def trained(*, mixed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)).cuda()
        mas = MAS(model, strength=1.0)
        scaler = torch.amp.GradScaler("cuda", enabled=mixed, init_scale=2.0**8)
        batches = torch.randn(2, 4, 6, 1, 8, 8, device="cuda")
        for split in batches:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for inputs in split:
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype=dtype, enabled=mixed):
                    value = loss(model(inputs), torch.arange(6, device="cuda") % 2)
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
                mas.add_penalty_grad()
                scaler.step(optimizer)
                scaler.update()
            with torch.autocast("cuda", dtype=dtype, enabled=mixed):
                mas.consolidate(list(split))
        return model, mas

    model, mas = trained(mixed=True)
    expected, expected_mas = trained(mixed=False)
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=5e-2, atol=5e-3)
    for name, value in mas.importance.items():
        torch.testing.assert_close(value, expected_mas.importance[name], rtol=0.1, atol=0.1)


def test_a_method_leaves_no_memory_behind():
    """A method that has gone out of use frees its tensors."""
    train(Finetune)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        train(MAS)
    assert torch.cuda.memory_allocated() - before < 2**20


def test_deterministic_algorithms_give_the_same_result_again(tmp_path):
    """In a process of its own, because cuBLAS reads its setting only once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from mas_embed import MAS, Recipe, RetrievalEvaluator, digits, seeded, train_sequence\n"
        "from mas_embed.testing import loss\n"
        "torch.use_deterministic_algorithms(True)\n"
        "def train():\n"
        "    with seeded(0):\n"
        "        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16))\n"
        "    recipe = Recipe(epochs=1)\n"
        "    train_sequence(model, digits()[:2], method=MAS(model), loss=loss, recipe=recipe)\n"
        "    return model.state_dict().values()\n"
        "first, second = train(), train()\n"
        "assert all(value.is_cuda for value in first)\n"
        "assert all(map(torch.equal, first, second))\n"
    )
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
