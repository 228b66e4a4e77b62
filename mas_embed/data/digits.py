"""scikit-learn's handwritten digits as a sequence of splits: the data that needs no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.split import Part, Split
from mas_embed.errors import UserError
from mas_embed.registry import Registry

DATASETS: Registry = Registry("data set")

HeldOut = Literal["test", "validation"]


@DATASETS.register("digits")
def digits(*, num_splits: int = 5, held_out: HeldOut = "test", seed: int = 0) -> list[Split]:
    """1,797 images of 8x8 pixels in 10 classes (Alpaydin & Kaynak, 1998), dealt into splits of consecutive digits.

    Of every class a quarter of the images is the test part, and a fifth of the rest the validation part; only what
    remains is trained on. Held-out images are queries and gallery at once.

    Args:
        num_splits: 1, 2, 5 or 10.
        held_out: what the splits are judged by: "test" for figures that are reported, "validation" for choosing
            options.
        seed: of the partition into train, validation and test.

    Returns:
        Splits named after their digits, "0-1" first; inputs float32 [N, 1, 8, 8] in [0, 1].
    """
    from sklearn.datasets import load_digits

    if num_splits not in (1, 2, 5, 10):
        raise UserError(f"num_splits must divide the ten digits: 1, 2, 5 or 10, got {num_splits}")
    check_held_out(held_out)
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.long)
    train, held = partition(labels, held_out, seed)
    return [_split(images, labels, train, held, chunk) for chunk in torch.arange(10).chunk(num_splits)]


def check_held_out(held_out: str) -> None:
    """Refuses what is neither "test" nor "validation"."""
    if held_out not in ("test", "validation"):
        raise UserError(f"held_out must be 'test' or 'validation', got '{held_out}'")


def partition(labels: Tensor, held_out: HeldOut, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to judge by, drawn class by class: test a quarter, validation a fifth of the rest."""
    generator = np.random.default_rng(seed)
    train, held = [], []
    for label in labels.unique():
        order = torch.from_numpy(generator.permutation((labels == label).nonzero()[:, 0].numpy()))
        test, rest = order.split([len(order) // 4, len(order) - len(order) // 4])
        validation, remaining = rest.split([len(rest) // 5, len(rest) - len(rest) // 5])
        train.append(remaining)
        held.append(test if held_out == "test" else validation)
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def _split(images: Tensor, labels: Tensor, train: Tensor, held: Tensor, classes: Tensor) -> Split:
    def part(indices: Tensor) -> Part:
        chosen = indices[torch.isin(labels[indices], classes)]
        return Part(images[chosen], labels[chosen], chosen)

    first, last = int(classes[0]), int(classes[-1])
    name = f"{first}-{last}" if first != last else str(first)
    held_out = part(held)
    return Split(name, part(train), query=held_out, gallery=held_out)
