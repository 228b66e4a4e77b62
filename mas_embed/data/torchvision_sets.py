"""The data sets of torchvision as sequences of splits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.partition import HeldOut, check_held_out
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError

Dataset = Literal["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"]


@DATASETS.register("torchvision")
def torchvision_images(
    *,
    dataset: Dataset,
    root: str | Path,
    num_splits: int = 5,
    images_per_class: int | None = None,
    download: bool = False,
    held_out: HeldOut = "test",
    seed: int = 0,
) -> list[Split]:
    """A data set of torchvision, dealt into splits of consecutive classes.

    What torchvision calls the training set is divided: of every class a fifth is the validation part, the rest is trained on.
    The test part is torchvision's test set. Held-out images are queries and gallery at once.

    Args:
        dataset: "MNIST", "FashionMNIST", "KMNIST", "CIFAR10" or "CIFAR100".
        root: where torchvision keeps it.
        num_splits: divides the number of classes.
        images_per_class: at most so many of every class in the training set, and half as many in the test set, drawn at
            random; None: all.
        download: fetch it if it is not there.
        held_out: "test" for figures that are reported, "validation" for choosing options.
        seed: of the draw and the partition.

    Returns:
        Inputs float32 [N, C, size, size] in [0, 1], in memory.

    Raises:
        UserError: the data set is not there, or `num_splits` does not divide its classes.
    """
    check_held_out(held_out)
    images, labels = _torchvision_arrays(dataset, root, train=True, download=download)
    generator = np.random.default_rng(seed)
    chosen = _draw(labels, images_per_class, generator)
    validation = _share(labels, chosen, 0.2, generator)
    train = chosen[~torch.isin(chosen, validation)]
    held = Part(images[validation], labels[validation], validation)
    if held_out == "test":
        test_images, test_labels = _torchvision_arrays(dataset, root, train=False, download=download)
        kept = _draw(test_labels, None if images_per_class is None else images_per_class // 2, generator)
        held = Part(test_images[kept], test_labels[kept], kept + len(labels))
    classes = labels.unique()
    if len(classes) % num_splits:
        raise UserError(f"num_splits must divide the {len(classes)} classes of {dataset}, got {num_splits}")
    return [
        _split_of_classes(own, Part(images[train], labels[train], train), held) for own in classes.chunk(num_splits)
    ]


def _split_of_classes(classes: Tensor, train: Part, held: Part) -> Split:
    def own(part: Part) -> Part:
        chosen = torch.isin(part.labels, classes)
        return Part(part.inputs[chosen], part.labels[chosen], part.ids[chosen])

    judged = own(held)
    return Split(f"{int(classes[0])}-{int(classes[-1])}", own(train), judged, judged)


def _draw(labels: Tensor, per_class: int | None, generator: np.random.Generator) -> Tensor:
    """Positions of at most `per_class` items of every class, in order; None: of all."""
    drawn = [_shuffled((labels == label).nonzero()[:, 0], generator)[:per_class] for label in labels.unique()]
    return torch.cat(drawn).sort().values


def _share(labels: Tensor, positions: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """A share of the positions of every class, in order."""
    drawn = []
    for label in labels.unique():
        own = _shuffled(positions[labels[positions] == label], generator)
        drawn.append(own[: round(share * len(own))])
    return torch.cat(drawn).sort().values


def _shuffled(positions: Tensor, generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.permutation(positions.numpy()))


def _torchvision_arrays(dataset: str, root: str | Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    import torchvision

    try:
        found = getattr(torchvision.datasets, dataset)(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"torchvision does not find {dataset} in {root} ({reason}); set data.download=true") from None
    pixels = torch.as_tensor(found.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.float() / 255, torch.as_tensor(found.targets).long()
