"""Unchanged networks in common use, compared with one autograd call per sample in float64."""

import pytest
import torch
import torchvision
from oracles import per_sample_importance
from torch import nn

from mas_embed import estimate_importance, explain_coverage

NETWORKS = {
    "resnet18": 32,
    "resnet50": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "convnext_tiny": 32,
    "vit_b_16": 32,
    "swin_t": 32,
}


def build(name):
    torch.manual_seed(0)
    sizes = {"image_size": 32} if name.startswith("vit") else {}
    model = getattr(torchvision.models, name)(weights=None, num_classes=8, **sizes).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model, torch.randn(3, 3, NETWORKS[name], NETWORKS[name], dtype=torch.float64)


def assert_equal(importance, expected):
    assert importance.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        torch.testing.assert_close(importance[name], value, rtol=1e-9, atol=float(1e-11 * scale) + 1e-300, msg=name)


QUICK = ("resnet18", "mobilenet_v3_small")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NETWORKS])
def test_torchvision(name):
    model, inputs = build(name)
    expected = per_sample_importance(model, inputs.split(1), lambda sample: [model(sample).square().sum()])
    assert_equal(estimate_importance(model, inputs.split(2)), expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_convolutional_networks_use_only_rules(name):
    model, inputs = build(name)
    assert set(explain_coverage(model, inputs).values()) == {"rule"}


class LanguageModel(nn.Module):
    """As in Hugging Face: keyword inputs, a dict as result, position embeddings, attention and pooling by mask."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(30, 8, padding_idx=0), nn.Embedding(12, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(2)
        return {"last_hidden_state": hidden, "pooled": (hidden * mask).sum(1) / mask.sum(1)}


def test_a_transformer_with_a_dict_as_input():
    torch.manual_seed(0)
    model = LanguageModel().double().eval()
    batch = {"input_ids": torch.randint(1, 30, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = batch["attention_mask"][3, 2:] = 0

    def embed(model, batch):
        return model(**batch)["pooled"]

    samples = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(5)]
    expected = per_sample_importance(model, samples, lambda sample: [embed(model, sample).square().sum()])
    batches = [{key: value[:3] for key, value in batch.items()}, {key: value[3:] for key, value in batch.items()}]
    assert_equal(estimate_importance(model, batches, embed=embed), expected)
    coverage = explain_coverage(model, batch, embed=embed)
    assert coverage["words.weight"] == "rule"
    assert coverage["positions.weight"] == "rule"  # looked up once for all samples
    assert coverage["encoder.layers.0.linear1.weight"] == "rule"


def test_an_lstm_embedder_of_words():
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.lstm = (
                nn.Embedding(20, 5),
                nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True),
            )
            self.head = nn.Linear(12, 4)

        def forward(self, words):
            return self.head(self.lstm(self.words(words))[0].mean(1))

    torch.manual_seed(0)
    model, inputs = Embedder().double(), torch.randint(20, (5, 6))
    expected = per_sample_importance(model, inputs.split(1), lambda sample: [model(sample).square().sum()])
    assert_equal(estimate_importance(model, inputs.split(2)), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_has_the_importance_of_the_uncompiled_one_under_its_parameter_names():
    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(),
        torch.randn(6, 4, dtype=torch.float64),
    )
    compiled = torch.compile(model, backend="eager")
    compiled(inputs)
    importance, expected = estimate_importance(compiled, [inputs]), estimate_importance(model, [inputs])
    assert set(importance) == {name for name, _ in compiled.named_parameters()}
    assert all(torch.equal(importance[f"_orig_mod.{name}"], value) for name, value in expected.items())


def test_channels_last_and_inputs_that_require_gradients():
    model, inputs = build("resnet18")
    expected = estimate_importance(model, [inputs])
    model.to(memory_format=torch.channels_last)
    inputs = inputs.to(memory_format=torch.channels_last).requires_grad_()
    assert_equal(estimate_importance(model, [inputs]), dict(expected))
    assert inputs.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_the_gpu_gives_the_importance_of_the_cpu(name):
    model, inputs = build(name)
    expected = estimate_importance(model, [inputs])
    importance = estimate_importance(model.cuda(), inputs.split(2))
    assert_equal({name: value.cpu() for name, value in importance.items()}, dict(expected))
