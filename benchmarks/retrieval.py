"""What exact mean average precision over the full ranking costs, against what is done instead, side by side in one process.

    python benchmarks/retrieval.py [--device cuda | --mapped]

Random unit vectors of 128 dimensions are searched among themselves. Ways: the matrix product of queries and gallery alone, in
blocks (`block @ gallery.T`, and into memory that is kept); `evaluate_retrieval`, with every measure; pytorch-metric-learning's
`AccuracyCalculator` with its full-ranking MAP; scikit-learn's `average_precision_score`, query by query; and torchmetrics'
`retrieval_average_precision`, query by query on shifted scores (it drops scores <= 0), if it is installed. Slow ways take fewer
queries; seconds are per thousand queries, medians of rounds in which the fast ways take turns. Memory is the peak above the
embeddings. On a GPU, `evaluate_retrieval` is also measured with the memory of a CPU, and a gallery of a million items without
the slow ways. With `--mapped`, a gallery of a million items is mapped from a file instead, and `compare_indexes` is measured,
too. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import median_seconds, peak_mebibytes
from sklearn.metrics import average_precision_score
from torch import Tensor

from mas_embed import compare_indexes, evaluate_retrieval
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


def mapped_product(queries: Any, gallery: Any) -> None:
    """The scores of a part of the mapped gallery and a block of queries at a time, into memory that is kept."""
    size = 2**16
    scores = torch.empty(BLOCK, size)
    for start in range(0, len(gallery), size):
        part = torch.from_numpy(np.array(gallery[start : start + size]))
        for block in torch.from_numpy(np.array(queries)).split(BLOCK):
            torch.mm(block, part.T, out=scores[: len(block), : len(part)])


def write_unit_vectors(path: Path, num_items: int, seed: int) -> Any:
    """Random unit vectors of 128 dimensions in a file, mapped and read once, so that they count as memory in use."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_items, 128))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num_items, 2**16):
        rows = torch.randn(min(2**16, num_items - start), 128, generator=generator)
        array[start : start + len(rows)] = torch.nn.functional.normalize(rows)
    del array
    mapped = np.load(path, mmap_mode="r")
    mapped.sum(dtype=np.float64)
    return mapped


def measure_mapped(num_queries: int, num_compared: int, num_gallery: int, num_relevant: int) -> list[dict[str, Any]]:
    """Measures and prints what evaluating and comparing mapped arrays costs; returns the lines."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        old, new = (write_unit_vectors(Path(folder) / f"{seed}.npy", num_gallery, seed) for seed in (0, 1))
        np.save(Path(folder) / "labels.npy", np.arange(num_gallery) % (num_gallery // num_relevant))
        labels = np.load(Path(folder) / "labels.npy", mmap_mode="r")
        few, queries, ids = slice(0, num_compared), slice(0, num_queries), np.arange(num_gallery)
        fit_on = (old[-2000:], new[-2000:])
        ways: dict[str, tuple[Callable[[], Any], int]] = {
            "matrix product alone": (partial(mapped_product, old[queries], old), num_queries),
            "evaluate_retrieval, every measure": (
                partial(
                    evaluate_retrieval,
                    old[queries],
                    labels[queries],
                    old,
                    labels,
                    query_ids=ids[queries],
                    gallery_ids=ids,
                ),
                num_queries,
            ),
            "compare_indexes, three compensations": (
                partial(compare_indexes, old[few], new[few], old, new, labels[few], labels, fit_on=fit_on),
                num_compared,
            ),
        }
        task = f"{num_queries:,} x {num_gallery:,} mapped from files, {num_relevant} relevant"
        print(
            f"\n{task}\n\n| way | queries | seconds | processor seconds | over the product | peak MiB above the arrays |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        lines, base = [], 0.0
        for way, (call, size) in ways.items():
            for mapped in (old, new):
                mapped.sum(dtype=np.float64)  # a system may have put pages away that were not read for a while
            start, start_of_processor = time.perf_counter(), time.process_time()
            memory = peak_mebibytes(call, torch.device("cpu"))
            each = (time.perf_counter() - start) / size
            of_processor = (time.process_time() - start_of_processor) / size
            base = base or of_processor  # other programs do not count in it
            ratio = of_processor / base
            print(
                f"| {way} | {size} | {each * size:.0f} | {of_processor * size:.0f} | {ratio:.2f} | {memory:.0f} |",
                flush=True,
            )
            line = {"task": task, "way": way, "queries": size, "seconds_per_query": each, "ratio": ratio}
            line |= {"processor_seconds_per_query": of_processor, "peak_mebibytes": memory, "device": "cpu"}
            lines.append(line)
        return lines


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mapped", action="store_true", help="measure a gallery that is mapped from a file")
    parser.add_argument("--queries", type=int, default=10_000, help="of the mapped gallery")
    parser.add_argument("--compared", type=int, help="queries of compare_indexes; by default a tenth")
    parser.add_argument("--gallery", type=int, default=1_000_000, help="its size")
    arguments = parser.parse_args()
    device, lines = torch.device(arguments.device), []
    if arguments.mapped:
        compared = arguments.compared or arguments.queries // 10
        lines = measure_mapped(arguments.queries, compared, arguments.gallery, 20)
    for name, (num_queries, num_gallery, num_relevant) in ({} if arguments.mapped else tasks(device)).items():
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
