"""scikit-learn's handwritten digits as a sequence of splits. The images come with scikit-learn and need no download."""

from __future__ import annotations

import torch
from torch import Tensor

from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError


@DATASETS.register("digits")
def digits(*, num_splits: int = 5, held_out: HeldOut = "test", seed: int = 0) -> list[Split]:
    """1,797 images of 8x8 pixels in 10 classes (Alpaydin & Kaynak, 1998), divided into splits of consecutive digits.

    A quarter of the images of every class is held out for testing, and a fifth of the others for validation. The remaining
    images are trained on. The held-out images are both queries and gallery.

    Args:
        num_splits: 1, 2, 5 or 10.
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing
            options.
        seed: of the random division into training, validation and test images.

    Returns:
        Splits that are named after their digits, "0-1" first; inputs float32 [N, 1, 8, 8] in [0, 1].

    Raises:
        UserError: `num_splits` is another number, or `held_out` another word.
    """
    from sklearn.datasets import load_digits

    if num_splits not in (1, 2, 5, 10):
        raise UserError(f"num_splits must divide the ten digits: 1, 2, 5 or 10, got {num_splits}")
    check_held_out(held_out)
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.long)
    train, evaluated = partition(labels, held_out, seed)
    return [_split(images, labels, train, evaluated, classes) for classes in torch.arange(10).chunk(num_splits)]


def _split(images: Tensor, labels: Tensor, train: Tensor, evaluated: Tensor, classes: Tensor) -> Split:
    def part_of_classes(indices: Tensor) -> Part:
        selected = indices[torch.isin(labels[indices], classes)]
        return Part(images[selected], labels[selected], selected)

    first, last = int(classes[0]), int(classes[-1])
    name = f"{first}-{last}" if first != last else str(first)
    held_out = part_of_classes(evaluated)
    return Split(name, part_of_classes(train), query=held_out, gallery=held_out)
