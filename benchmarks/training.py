"""Cost of the training loop beside a plain PyTorch loop, memory over epochs, and importance of a network for photographs.

Run: python benchmarks/training.py --help; the parts are chosen by --loop, --memory and --photographs.

--loop: images per second of `train_sequence` (method finetune, no evaluation) and of a plain loop over the same `DataLoader`
of JPEG files, with 0, 1 and 2 workers; the same network, optimizer, loss and batches, all in turn in every round. The files are
written to a temporary folder. They are decoded in every epoch, or, with --cached, in the first only.

--memory: the resident memory of the process after every epoch of one split.

--many-splits N: resident memory and seconds over a sequence of N tiny splits, with checkpoints, method MAS.

--photographs: importance of a ResNet-50 over photographs of 224 pixels, beside plain forward and backward passes over the
same: seconds, and peak memory above what was there before.

Prints tables and JSON lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from measuring import median_seconds, peak_mebibytes, resident_mebibytes
from PIL import Image
from torch import Tensor, nn

import mas_embed as me
from mas_embed.data import ImageFiles
from mas_embed.models import backbone
from mas_embed.runtime.environment import describe_environment

NUM_CLASSES = 8


@dataclass(frozen=True)
class Case:
    """A network and the images that it is trained on: JPEG files of one size, scaled to another."""

    name: str
    network: str
    file_size: int
    image_size: int
    num_images: int


CASES = {
    "small": Case("ResNet-20, 32 px", "cifar_resnet20", 96, 32, 512),
    "large": Case("ResNet-18, 112 px", "resnet18", 256, 112, 128),
}


class NoEvaluation:
    """An evaluator that measures nothing, so that only training takes time."""

    def begin_split(self, model: nn.Module, splits: Any, split_index: int) -> None:
        """Does nothing."""

    def evaluate(self, model: nn.Module, splits: Any, split_index: int) -> me.Evaluation:
        """A score of 0 for every split."""
        return me.Evaluation({"none": [0.0] * len(splits)}, {"none": 0.0})

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Does nothing."""


class Splits(me.Callback):
    """Collects the resident memory after every split, in MiB."""

    def __init__(self) -> None:
        self.mebibytes: list[float] = []

    def on_split_end(self, event: Any) -> None:
        """Adds one value."""
        self.mebibytes.append(resident_mebibytes())


class Epochs(me.Callback):
    """Collects the resident memory after every epoch, in MiB."""

    def __init__(self) -> None:
        self.mebibytes: list[float] = []

    def on_epoch_end(self, event: Any) -> None:
        """Adds one value."""
        self.mebibytes.append(resident_mebibytes())


def write_photographs(folder: Path, *, size: int, number: int) -> list[Path]:
    """JPEG files of smooth random colours, which take as long to decode as photographs of their size."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{index:04}.jpg" for index in range(number)]
    for path in paths:
        coarse = Image.fromarray(generator.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def part_of(case: Case, folder: Path, *, is_cached: bool) -> me.Part:
    """The files as a part, with labels in turn."""
    paths = write_photographs(folder, size=case.file_size, number=case.num_images)
    files = ImageFiles(paths, size=case.image_size, keep_megabytes=1024 if is_cached else 0)
    return me.Part(files, torch.arange(case.num_images) % NUM_CLASSES)


def make_model(case: Case) -> nn.Module:
    """The network of a case with random weights."""
    with me.seeded(0):
        return backbone(network=case.network, weights="none", embedding_size=64)


def loss(embeddings: Tensor, labels: Tensor, mined: Any = None) -> Tensor:  # noqa: ARG001  (the signature of all losses)
    """Mean squared distance within classes, less that between."""
    distances = torch.cdist(embeddings, embeddings)
    same = labels[:, None] == labels
    return distances[same].mean() - distances[~same].mean()


def plain_loop(model: nn.Module, part: me.Part, recipe: me.Recipe) -> None:
    """What a training script does by itself, with the loader of the library."""
    with me.seeded(0):
        batches = me.training_batches(part, batch_size=recipe.batch_size, num_workers=recipe.num_workers)
        optimizer = recipe.optimizer(model.parameters())
        for _ in range(recipe.epochs):
            model.train()
            losses = []
            for inputs, labels in batches:
                optimizer.zero_grad()
                value = loss(model(inputs), labels)
                value.backward()
                optimizer.step()
                losses.append(value.detach())
            float(torch.stack(losses).mean())


def library_loop(model: nn.Module, part: me.Part, recipe: me.Recipe, callbacks: tuple[me.Callback, ...] = ()) -> None:
    """The same by `train_sequence`."""
    me.train_sequence(
        model,
        [me.Split("photographs", part, part, part)],
        method=me.Finetune(model),
        loss=loss,
        recipe=recipe,
        evaluator=NoEvaluation(),
        callbacks=callbacks,
    )


def measure_loop(case: Case, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images per second of both loops, for every number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        part = part_of(case, Path(folder), is_cached=arguments.cached)
        for num_workers in arguments.workers:
            recipe = me.Recipe(epochs=arguments.epochs, batch_size=32, num_workers=num_workers)
            ways: dict[str, Callable[[], Any]] = {
                name: partial(run, make_model(case), part, recipe)
                for name, run in {"plain": plain_loop, "train_sequence": library_loop}.items()
            }
            medians = median_seconds(ways, arguments.rounds, torch.device("cpu"))
            speeds = {name: arguments.epochs * case.num_images / seconds for name, seconds in medians.items()}
            yield {
                "part": "loop",
                "case": case.name,
                "cached": arguments.cached,
                "workers": num_workers,
                "images": case.num_images,
                "images_per_second": speeds,
                "ratio": medians["train_sequence"] / medians["plain"],
            }


def measure_memory(case: Case, num_epochs: int, num_workers: int) -> dict[str, Any]:
    """Resident memory after every epoch of `train_sequence`."""
    with tempfile.TemporaryDirectory() as folder:
        part, epochs = part_of(case, Path(folder), is_cached=True), Epochs()
        recipe = me.Recipe(epochs=num_epochs, batch_size=32, num_workers=num_workers)
        library_loop(make_model(case), part, recipe, (epochs,))
    return {"part": "memory", "case": case.name, "workers": num_workers, "mebibytes": epochs.mebibytes}


def measure_many_splits(num_splits: int) -> dict[str, Any]:
    """Resident memory after every split of a sequence of tiny splits."""
    generator = torch.Generator().manual_seed(0)
    parts = [me.Part(torch.randn(16, 8, generator=generator), torch.arange(16) % 2) for _ in range(num_splits)]
    splits = [me.Split(f"split {index}", part, part, part) for index, part in enumerate(parts)]
    with me.seeded(0):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    watch = Splits()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        me.train_sequence(
            model,
            splits,
            method=me.MAS(model),
            loss=loss,
            recipe=me.Recipe(epochs=2, batch_size=8),
            evaluator=NoEvaluation(),
            callbacks=[watch],
            checkpoint=Path(folder) / "checkpoint.safetensors",
        )
    seconds = time.perf_counter() - start
    return {"part": "many splits", "splits": num_splits, "seconds": seconds, "mebibytes": watch.mebibytes}


def measure_importance(num_images: int, batch_size: int) -> list[dict[str, Any]]:
    """Seconds and peak memory of importance and of plain passes of a ResNet-50, each after one batch of warm-up."""
    model = torchvision.models.resnet50(weights=None, num_classes=128).eval()
    device = torch.device("cpu")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        files = ImageFiles(write_photographs(Path(folder), size=256, number=num_images), size=224, keep_megabytes=0)

        def batches(number: int) -> Iterator[Tensor]:
            for start in range(0, number, batch_size):
                yield torch.stack([files[index] for index in range(start, min(start + batch_size, number))])

        def plain(number: int) -> None:
            for inputs in batches(number):
                model.zero_grad()
                model(inputs).square().sum().backward()

        def importance(number: int) -> None:
            me.estimate_importance(model, batches(number))

        for name, run in {"plain forward + backward": plain, "importance": importance}.items():
            run(batch_size)
            model.zero_grad()
            start = time.perf_counter()
            peak = peak_mebibytes(partial(run, num_images), device)
            seconds = time.perf_counter() - start
            line = {"part": "photographs", "way": name, "images": num_images, "batch_size": batch_size}
            lines.append(line | {"seconds": seconds, "peak_mebibytes": peak})
    return lines


def print_loop(lines: list[dict[str, Any]]) -> None:
    """A table of `measure_loop`."""
    print("\n| network | workers | plain loop, images/s | train_sequence, images/s | seconds over plain |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for line in lines:
        plain, library = (f"{value:.0f}" for value in line["images_per_second"].values())
        print(f"| {line['case']} | {line['workers']} | {plain} | {library} | {line['ratio']:.3f} |")


def print_photographs(lines: list[dict[str, Any]]) -> None:
    """A table of `measure_importance`."""
    print(
        "\n| way | images | seconds | over plain | peak MiB | over plain |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for line in lines:
        ratio, more = line["seconds"] / lines[0]["seconds"], line["peak_mebibytes"] - lines[0]["peak_mebibytes"]
        cells = [f"{line['seconds']:.1f}", f"{ratio:.2f}", f"{line['peak_mebibytes']:.0f}", f"{more:+.0f}"]
        print(f"| {line['way']} | {line['images']} | {' | '.join(cells)} |")


def print_memory(line: dict[str, Any]) -> None:
    """The resident memory after the first, the second and the last epoch."""
    values = line["mebibytes"]
    print(
        f"\n{line['case']}, {line['workers']} workers: {values[0]:.0f} MiB after the first of {len(values)} epochs, "
        f"{values[min(1, len(values) - 1)]:.0f} after the second, {values[-1]:.0f} after the last"
    )


def print_many_splits(line: dict[str, Any]) -> None:
    """The resident memory after a twentieth of the splits, after half of them and after all."""
    values = line["mebibytes"]
    shown = [
        (number, values[number - 1]) for number in (max(len(values) // 20, 1), max(len(values) // 2, 1), len(values))
    ]
    after = ", ".join(f"{mebibytes:.0f} MiB after {number}" for number, mebibytes in shown)
    print(f"\n{line['splits']} tiny splits in {line['seconds']:.0f} s: {after}")


def main() -> None:
    """Measures and prints the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("loop", "memory", "photographs"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="of --loop")
    parser.add_argument("--loop-images", type=int, help="of an epoch of --loop, if not that of the case")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="of --loop")
    parser.add_argument("--cached", action="store_true", help="keep decoded images in memory, in --loop")
    parser.add_argument("--rounds", type=int, default=5, help="of --loop, after one of warm-up")
    parser.add_argument("--epochs", type=int, default=2, help="of --loop, in a round")
    parser.add_argument("--memory-epochs", type=int, default=20, help="of --memory")
    parser.add_argument("--many-splits", type=int, metavar="N", help="memory over N tiny splits")
    parser.add_argument("--images", type=int, default=512, help="of --photographs")
    parser.add_argument("--batch-size", type=int, default=16, help="of --photographs")
    arguments = parser.parse_args()
    if not (arguments.loop or arguments.memory or arguments.photographs or arguments.many_splits):
        parser.error("choose at least one of --loop, --memory, --many-splits and --photographs")
    lines: list[dict[str, Any]] = []
    if arguments.loop:
        cases = [CASES[name] for name in arguments.cases]
        if arguments.loop_images:
            cases = [replace(case, num_images=arguments.loop_images) for case in cases]
        lines += (line for case in cases for line in measure_loop(case, arguments))
        print_loop(lines)
    if arguments.memory:
        lines.append(measure_memory(CASES["small"], arguments.memory_epochs, num_workers=0))
        print_memory(lines[-1])
    if arguments.many_splits:
        lines.append(measure_many_splits(arguments.many_splits))
        print_many_splits(lines[-1])
    if arguments.photographs:
        found = measure_importance(arguments.images, arguments.batch_size)
        print_photographs(found)
        lines += found
    print()
    for line in lines:
        print(json.dumps(line))
    print(json.dumps({"threads": torch.get_num_threads(), **describe_environment()}))


if __name__ == "__main__":
    main()
