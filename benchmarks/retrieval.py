"""What exact mean average precision over the full ranking costs, against what is done instead, side by side in one process.

    python benchmarks/retrieval.py [--device cuda]

Random unit vectors of 128 dimensions are searched among themselves. Ways: the matrix product of queries and gallery alone, in
blocks (`block @ gallery.T`, and into memory that is kept); `evaluate_retrieval`, with every measure; pytorch-metric-learning's
`AccuracyCalculator` with its full-ranking MAP; scikit-learn's `average_precision_score`, query by query; and torchmetrics'
`retrieval_average_precision`, query by query on shifted scores (it drops scores <= 0), if it is installed. Slow ways take fewer
queries; seconds are per thousand queries, medians of rounds in which the fast ways take turns. Memory is the peak above the
embeddings. On a GPU, `evaluate_retrieval` is also measured with the memory of a CPU, and a gallery of a million items without
the slow ways. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import median_seconds, peak_mebibytes
from sklearn.metrics import average_precision_score
from torch import Tensor

from mas_embed import evaluate_retrieval
from mas_embed.runtime.environment import describe_environment

BLOCK = 512
LARGEST_GALLERY = 100_000  # of the slow ways
CPU_MEMORY_MIB = 256  # the default of `evaluate_retrieval` on a CPU


def product(queries: Tensor, gallery: Tensor) -> None:
    """The scores of a block at a time."""
    for block in queries.split(BLOCK):
        block @ gallery.T


def product_in_place(queries: Tensor, gallery: Tensor) -> None:
    """The scores of a block at a time, always into the same memory."""
    scores = gallery.new_empty(BLOCK, len(gallery))
    for block in queries.split(BLOCK):
        torch.mm(block, gallery.T, out=scores[: len(block)])


def ours(
    queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, *, memory_mib: int | None = None
) -> float:
    """Every query is the gallery item at its place."""
    ids = torch.arange(len(gallery))
    scores = evaluate_retrieval(
        queries,
        labels,
        gallery,
        gallery_labels,
        query_ids=ids[: len(queries)],
        gallery_ids=ids,
        memory_mib=memory_mib,
    )
    return scores.mean_average_precision


def metric_learning(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """pytorch-metric-learning's, of all neighbours."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=("mean_average_precision",), k=len(gallery) - 1, device=queries.device)
    accuracy = calculator.get_accuracy(queries, labels, gallery, gallery_labels, ref_includes_query=True)
    return float(accuracy["mean_average_precision"])


def scikit_learn(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """A call per query; the scores' own time is counted too."""
    total = 0.0
    for index, scores in enumerate((queries @ gallery.T).cpu()):
        others = torch.arange(len(gallery)) != index
        is_relevant = (gallery_labels.cpu() == labels[index].cpu())[others]
        total += float(average_precision_score(is_relevant, scores[others]))
    return total / len(queries)


def torch_metrics(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """All pairs of query and item as one list, scores moved above zero."""
    from torchmetrics.functional.retrieval import retrieval_average_precision

    total = 0.0
    for index, scores in enumerate(queries @ gallery.T + 2):
        others = torch.arange(len(gallery), device=scores.device) != index
        total += float(retrieval_average_precision(scores[others], gallery_labels[others] == labels[index]))
    return total / len(queries)


def tasks(device: torch.device) -> dict[str, tuple[int, int, int]]:
    """By name: queries, gallery items, relevant items of each query (itself among them)."""
    known = {"20k x 20k, 60 relevant": (20_000, 20_000, 60), "60k x 60k, 5 relevant": (60_000, 60_000, 5)}
    return known | ({"10k x 1M, 20 relevant": (10_000, 1_000_000, 20)} if device.type == "cuda" else {})


def contestants() -> dict[str, tuple[Callable[..., Any], int]]:
    """The ways that are measured once, and how many queries each takes."""
    slow: dict[str, tuple[Callable[..., Any], int]] = {
        "pytorch-metric-learning": (metric_learning, 1000),
        "scikit-learn, query by query": (scikit_learn, 100),
    }
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        return slow
    return slow | {"torchmetrics, query by query": (torch_metrics, 100)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, lines = torch.device(arguments.device), []
    for name, (num_queries, num_gallery, num_relevant) in tasks(device).items():
        generator = torch.Generator().manual_seed(0)
        gallery = torch.nn.functional.normalize(torch.randn(num_gallery, 128, generator=generator)).to(device)
        labels = (torch.arange(num_gallery) % (num_gallery // num_relevant)).to(device)
        ways: dict[str, tuple[Callable[[], Any], int]] = {
            "matrix product alone": (partial(product, gallery[:num_queries], gallery), num_queries),
            "the same into memory that is kept": (
                partial(product_in_place, gallery[:num_queries], gallery),
                num_queries,
            ),
            "mas-embed, every measure": (
                partial(ours, gallery[:num_queries], labels[:num_queries], gallery, labels),
                num_queries,
            ),
        }
        if device.type == "cuda":
            way, (call, size) = f"the same, memory_mib={CPU_MEMORY_MIB}", ways["mas-embed, every measure"]
            ways[way] = (partial(call, memory_mib=CPU_MEMORY_MIB), size)
        seconds = median_seconds({way: call for way, (call, _) in ways.items()}, arguments.rounds, device)
        for way, (call, most) in (contestants() if num_gallery <= LARGEST_GALLERY else {}).items():
            size = min(most, num_queries)
            ways[way] = (partial(call, gallery[:size], labels[:size], gallery, labels), size)
            seconds |= median_seconds({way: ways[way][0]}, 1, device)
        print(f"\n{name}, {device}\n\n| way | queries | seconds per 1000 queries | over the product | peak MiB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        base = seconds["matrix product alone"] / num_queries
        for way, (call, size) in ways.items():
            each, memory = seconds[way] / size, peak_mebibytes(call, device)
            print(f"| {way} | {size} | {1000 * each:.3g} | {each / base:.2f} | {memory:.0f} |")
            line = {"task": name, "way": way, "queries": size, "seconds_per_query": each, "ratio": each / base}
            lines.append(line | {"peak_mebibytes": memory, "device": str(device)})
    print()
    for line in lines:
        print(json.dumps(line))
    print(json.dumps(describe_environment()))


if __name__ == "__main__":
    main()
