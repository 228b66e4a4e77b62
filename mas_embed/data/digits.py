"""scikit-learn's handwritten digits as a sequence of splits: the data set that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor

from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError


@DATASETS.register("digits")
def digits(*, num_splits: int = 5, held_out: HeldOut = "test", seed: int = 0) -> list[Split]:
    """1,797 images of 8x8 pixels in 10 classes (Alpaydin & Kaynak, 1998), divided into splits of consecutive digits.

    Of every class a quarter of the images is the test part, and a fifth of the rest the validation part; only the
    remaining images are trained on. Held-out images are queries and gallery at once.

    Args:
        num_splits: 1, 2, 5 or 10.
        held_out: the part on which the splits are evaluated: "test" for figures that are reported, "validation" for
            choosing options.
        seed: of the partition into train, validation and test.

    Returns:
        Splits named after their digits, "0-1" first; inputs float32 [N, 1, 8, 8] in [0, 1].

    Raises:
        UserError: another number of splits, or an unknown part.
    """
    from sklearn.datasets import load_digits

    if num_splits not in (1, 2, 5, 10):
        raise UserError(f"num_splits must divide the ten digits: 1, 2, 5 or 10, got {num_splits}")
    check_held_out(held_out)
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.long)
    train, held = partition(labels, held_out, seed)
    return [_split(images, labels, train, held, classes) for classes in torch.arange(10).chunk(num_splits)]


def _split(images: Tensor, labels: Tensor, train: Tensor, held: Tensor, classes: Tensor) -> Split:
    def part(indices: Tensor) -> Part:
        chosen = indices[torch.isin(labels[indices], classes)]
        return Part(images[chosen], labels[chosen], chosen)

    first, last = int(classes[0]), int(classes[-1])
    name = f"{first}-{last}" if first != last else str(first)
    held_out = part(held)
    return Split(name, part(train), query=held_out, gallery=held_out)
