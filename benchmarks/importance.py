"""What exact importance costs, against what is done instead, side by side in one process.

    python benchmarks/importance.py [--device cuda]

Per network and batch: plain forward and backward; the exact estimate of one batch (with the proof that samples do not mix),
and per batch of a longer run (where the proof is made once); a loop with batch size 1; `torch.func.vmap(grad)`; and the batch
gradient's absolute value, as Avalanche and others take it, with its rank correlation to the exact importance. Seconds are
medians of rounds in which all take turns; memory is the peak above what was there before. On a GPU, which small batches leave
mostly idle, larger ones are measured, too. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from measuring import median_seconds, peak_mebibytes
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import BertConfig, BertModel

from mas_embed import estimate_importance, explain_coverage
from mas_embed.importance.rules.absolute_products import has_compiled_products
from mas_embed.runtime.environment import describe_environment
from mas_embed.runtime.text_models import mean_pooling

LONG_RUN = 4
VOCABULARY = 5000


class TextEncoder(nn.Module):
    """A BERT-like encoder with mean pooling, whose position embeddings are looked up once for all samples."""

    def __init__(self, *, num_layers: int = 6, num_heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden, "num_attention_heads": num_heads, "intermediate_size": 4 * hidden}
        config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=num_layers, **sizes)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The embeddings [N, D] of token ids [N, T]."""
        return mean_pooling(self.encoder, input_ids)


class TorchEncoder(nn.Module):
    """PyTorch's own transformer encoder of 6 layers (`nn.MultiheadAttention`) with mean pooling."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Parameter(torch.randn(32, hidden))
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The embeddings [N, D] of token ids [N, T]."""
        return self.encoder(self.words(input_ids) + self.positions).mean(1)


def networks(device: torch.device) -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks of several kinds, each with a batch; on a GPU larger ones, too."""
    torch.manual_seed(0)
    large = torchvision.models.resnet18(weights=None, num_classes=128)
    small = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(2304, 128), nn.ReLU(), nn.Linear(128, 64)),
    )
    vision = torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=64
    )
    nn.init.normal_(vision.heads.head.weight, std=0.1)  # torchvision sets it to zero, and the embeddings with it
    larger: dict[str, tuple[nn.Module, Tensor]] = {}
    if device.type == "cuda":
        larger = {
            "ResNet-18, 256x3x112x112": (large, torch.randn(256, 3, 112, 112)),
            "ResNet-50, 64x3x224x224": (
                torchvision.models.resnet50(weights=None, num_classes=128),
                torch.randn(64, 3, 224, 224),
            ),
            "BERT-like encoder, 12 layers, hidden 768, 64 texts of 128 tokens": (
                TextEncoder(num_layers=12, num_heads=12, hidden=768),
                torch.randint(VOCABULARY, (64, 128)),
            ),
        }
    texts = torch.randint(VOCABULARY, (64, 32))
    return {
        "ResNet-18, 16x3x112x112": (large, torch.randn(16, 3, 112, 112)),
        "small convnet, 64x3x48x48": (small, torch.randn(64, 3, 48, 48)),
        "BERT-like encoder, 6 layers, hidden 128, 64 texts of 32 tokens": (TextEncoder(), texts),
        "BERT-like encoder, 6 layers, hidden 64, 64 texts of 32 tokens": (TextEncoder(hidden=64), texts),
        "nn.TransformerEncoder, 6 layers, hidden 128, 64 texts of 32 tokens": (TorchEncoder(128), texts),
        "ViT, 6 layers, hidden 128, 16x3x64x64 in patches of 8": (vision, torch.randn(16, 3, 64, 64)),
        **larger,
    }


def contestants(model: nn.Module, inputs: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every way by name, and how many batches one call of it takes."""
    parameters = dict(model.named_parameters())

    def plain() -> None:
        model.zero_grad()
        model(inputs).square().sum().backward()

    def loop() -> dict[str, Tensor]:
        totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for sample in inputs.split(1):
            gradients = torch.autograd.grad(model(sample).square().sum(), list(parameters.values()))
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += gradient.abs()
        return totals

    def vectorized() -> dict[str, Tensor]:
        def value(own: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, own, (sample.unsqueeze(0),)).square().sum()

        warnings.filterwarnings("ignore", message="There is a performance drop")  # of attention on the CPU
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        return {name: g.abs().sum(0) for name, g in vmap(grad(value), in_dims=(None, 0))(detached, inputs).items()}

    return {
        "plain forward + backward": (plain, 1),
        "exact": (lambda: estimate_importance(model, [inputs]), 1),
        f"exact, per batch of {LONG_RUN}": (lambda: estimate_importance(model, [inputs] * LONG_RUN), LONG_RUN),
        "loop, batch size 1": (loop, 1),
        "vmap(grad)": (vectorized, 1),
        "batch gradient (approximation)": (lambda: estimate_importance(model, [inputs], granularity="batch"), 1),
    }


def rank_correlation(exact: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Spearman's: the correlation of the ranks of all parameters."""
    ranks = [torch.cat([record[name].flatten() for name in exact]).argsort().argsort() for record in (exact, other)]
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="measures only the networks whose name contains this text")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    lines = []
    for name, (model, inputs) in networks(device).items():
        if arguments.only not in name:
            continue
        model.to(device).eval()
        inputs = inputs.to(device)
        num_by_fallback = list(explain_coverage(model, inputs).values()).count("fallback")
        ways = contestants(model, inputs)
        medians = median_seconds({name: call for name, (call, _) in ways.items()}, arguments.rounds, device)
        medians = {name: value / ways[name][1] for name, value in medians.items()}
        plain = medians["plain forward + backward"]
        model.zero_grad()  # so that its gradients, one copy of the parameters, count
        plain_memory = peak_mebibytes(ways["plain forward + backward"][0], device)
        exact = dict(estimate_importance(model, [inputs]))
        print(f"\n{name}, {device}\n\n| way | milliseconds | over plain | peak MiB | over plain | rank correlation |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for way, (call, _) in ways.items():
            model.zero_grad()
            memory = plain_memory if way.startswith("plain") else peak_mebibytes(call, device)
            correlation = rank_correlation(exact, dict(call())) if "approximation" in way else None
            shown = f"{correlation:.3f}" if correlation is not None else ""
            cells = [
                f"{1000 * medians[way]:.1f}",
                f"{medians[way] / plain:.2f}",
                f"{memory:.0f}",
                f"{memory - plain_memory:+.0f}",
            ]
            print(f"| {way} | {' | '.join(cells)} | {shown} |")
            line = {"network": name, "way": way, "seconds": medians[way], "ratio": medians[way] / plain}
            line |= {"num_parameters_by_fallback": num_by_fallback}
            lines.append(line | {"peak_mebibytes": memory, "rank_correlation": correlation, "device": str(device)})
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
        print(f"\nOne copy of the parameters is {size:.0f} MiB; {num_by_fallback} parameters use the fallback.")
    print()
    for line in lines:
        print(json.dumps(line))
    print(json.dumps({"compiled products": has_compiled_products(), **describe_environment()}))


if __name__ == "__main__":
    main()
