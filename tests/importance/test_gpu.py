"""Importance on a GPU, compared with that on the CPU in float64."""

import copy

import pytest
import torch
import torchvision
from importance_cases import CASES, make
from importance_cases import assert_equal as assert_equal_exactly
from torch import nn

from mas_embed import Importance, OnlineImportance, estimate_importance, estimate_local_importance, fingerprint_of
from mas_embed.runtime.forward import batch_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_THE_CPU = {
    "shared positions",
    "shared in every layer",
}  # networks that make tensors on the CPU in their forward pass


@pytest.fixture
def full_precision():
    """Convolutions in float32 instead of TF32, which is torch's default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield


def small_conv():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Flatten()),
        *(nn.Linear(8 * 16 * 16, 32), nn.ReLU(), nn.Linear(32, 16)),
    )


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        self.encoder = BertModel(BertConfig(vocab_size=100, **sizes), add_pooling_layer=False)

    def forward(self, input_ids):
        return self.encoder(input_ids=input_ids).last_hidden_state.mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.words, self.head = nn.Embedding(100, 8), nn.Linear(24, 6)
        self.layers = kind(8, 12, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True)

    def forward(self, words):
        return self.head(self.layers(self.words(words))[0].mean(1))


NETWORKS = {
    "small_conv": (small_conv, (6, 3, 16, 16)),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None, num_classes=16), (6, 3, 64, 64)),
    "resnext": (lambda: torchvision.models.resnext50_32x4d(weights=None, num_classes=16), (4, 3, 64, 64)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=16), (6, 3, 64, 64)),
    "bert": (Bert, (6, 7)),
    "lstm": (Recurrent, (6, 5)),
    "gru": (lambda: Recurrent(nn.GRU), (6, 5)),
}


def build(name):
    """A network in float64 on the CPU in eval mode, and inputs."""
    make_network, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make_network().double().eval()
    inputs = torch.randn(shape, dtype=torch.float64) if len(shape) > 2 else torch.randint(100, shape)
    return model, inputs


def in_float32_on_the_gpu(model, inputs):
    return copy.deepcopy(model).float().cuda(), (inputs.float() if inputs.is_floating_point() else inputs).cuda()


def relative_errors(importance, expected):
    """By parameter; parameters whose importance is zero but for rounding, as that of the biases of keys, count little."""
    assert importance.keys() == expected.keys()
    smallest = 1e-4 * max(float(value.norm()) for value in expected.values())
    return {
        name: float((importance[name].double().cpu() - value).norm() / value.norm().clamp_min(smallest))
        for name, value in expected.items()
    }


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"exponent": 2}, {"output": "projection"}], ids=str)
def test_equals_the_cpu_in_float64(name, options):
    model, inputs = build(name)
    expected = dict(estimate_importance(model, [inputs], **options))
    on_gpu, batch = in_float32_on_the_gpu(model, inputs)
    importance = estimate_importance(on_gpu, batch.split(4), **options)
    assert all(value.is_cuda for value in importance.values())
    errors = relative_errors(importance, expected)
    assert max(errors.values()) < 1e-4 * options.get("exponent", 1), max(errors, key=errors.get)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_not_refused_in_tf32(name):
    """With the default of torch, by which convolutions compute in TF32, samples still count as independent.

    Through the layers of an untrained ResNet, whose batch normalisation has no statistics yet, the rounding adds up to 4 %.
    """
    model, inputs = build(name)
    expected = dict(estimate_importance(model, [inputs]))
    on_gpu, batch = in_float32_on_the_gpu(model, inputs)
    errors = relative_errors(estimate_importance(on_gpu, [batch]), expected)
    assert max(errors.values()) < 0.1, max(errors, key=errors.get)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_THE_CPU])
@pytest.mark.parametrize("exponent", [1, 2])
def test_every_kind_of_layer_in_float64(name, exponent):
    model, inputs = make(name)
    expected = dict(estimate_importance(model, [inputs], exponent=exponent))
    importance = estimate_importance(copy.deepcopy(model).cuda(), [inputs], exponent=exponent)
    rtol = 1e-6 if name == "weight norm" else 1e-8  # torch's CUDA kernel stores the norms of weights in float32
    assert_equal_exactly({key: value.cpu() for key, value in importance.items()}, expected, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype):
    model, inputs = build("small_conv")
    expected = dict(estimate_importance(model, [inputs]))
    on_gpu, batch = in_float32_on_the_gpu(model, inputs)
    with torch.autocast("cuda", dtype=dtype):
        importance = estimate_importance(on_gpu, [batch])
    assert all(value.dtype == torch.float32 for value in importance.values())
    errors = relative_errors(importance, expected)
    assert max(errors.values()) < 5e-2, max(errors, key=errors.get)


def test_a_recurrent_network_is_unchanged():
    model, inputs = build("lstm")
    on_gpu, batch = in_float32_on_the_gpu(model, inputs)
    before = {name: dict(vars(module)) for name, module in on_gpu.named_modules()}
    estimate_importance(on_gpu, [batch])
    assert {name: dict(vars(module)) for name, module in on_gpu.named_modules()} == before
    assert on_gpu.layers.dropout == 0.5
    assert not on_gpu.layers.training


def test_online_importance():
    model, inputs = build("small_conv")
    on_gpu, batch = (model.cuda(), inputs.cuda())
    online, restored = OnlineImportance(on_gpu), OnlineImportance(on_gpu)
    with torch.inference_mode():
        for request in batch.split(2):
            on_gpu(request)
            online.observe(request)
    state = online.state_dict()
    state["sums"] = {name: value.cpu() for name, value in state["sums"].items()}
    restored.load_state_dict(state)
    expected = dict(estimate_importance(on_gpu, [batch]))
    assert_equal_exactly(dict(online.importance()), expected, rtol=1e-9)
    assert_equal_exactly(dict(restored.importance()), expected, rtol=1e-9)


def test_local_importance():
    model, inputs = build("small_conv")
    expected = dict(estimate_local_importance(model, [inputs]))
    importance = estimate_local_importance(model.cuda(), [inputs])
    assert_equal_exactly({name: value.cpu() for name, value in importance.items()}, expected, rtol=1e-9)


def test_records_of_both_devices_are_merged(tmp_path):
    model, inputs = build("small_conv")
    expected = dict(estimate_importance(model, [inputs]))
    estimate_importance(model, [inputs[:2]]).save(tmp_path / "first.safetensors")
    second = estimate_importance(model.cuda(), [inputs[2:]])
    merged = Importance.merge(second, Importance.load(tmp_path / "first.safetensors"))
    assert_equal_exactly({name: value.cpu() for name, value in merged.items()}, expected, rtol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fingerprint_is_that_of_the_cpu(name):
    model, _ = build(name)
    assert fingerprint_of(model) == fingerprint_of(copy.deepcopy(model).cuda())


def test_a_batch_of_the_gpu_for_a_model_on_the_cpu():
    """The copy has ended when it is read, although it would be asynchronous if it were asked for so."""
    values = torch.arange(2**24, device="cuda", dtype=torch.float32)
    for _ in range(5):
        busy = values.reshape(4096, 4096) @ values.reshape(4096, 4096)
        shifted = values + busy[0, 0] * 0 + 1
        assert torch.equal(batch_to(shifted, torch.device("cpu")), torch.arange(2**24, dtype=torch.float32) + 1)
