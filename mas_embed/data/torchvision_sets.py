"""The data sets of torchvision as sequences of splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.partition import HeldOut, check_held_out
from mas_embed.data.split import DATASETS, Part, Split
from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.checks import check_at_least, check_choice

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
    """A data set of torchvision, divided into splits of consecutive classes.

    A fifth of torchvision's training images of every class is held out for validation, and the others are trained on. The test
    images are those of torchvision's test set. The held-out images are both queries and gallery.

    Args:
        dataset: "MNIST", "FashionMNIST", "KMNIST", "CIFAR10" or "CIFAR100".
        root: the folder in which torchvision stores the data set.
        num_splits: the number of splits; it must divide the number of classes.
        images_per_class: the largest number of images of a class that is drawn from the training set; half as many are drawn
            from the test set. None takes all images.
        download: whether torchvision downloads the data set if `root` does not hold it.
        held_out: the images on which the splits are evaluated: "test" for reported results, "validation" for choosing
            options.
        seed: of the random draw of images and of the division into training and validation images.

    Returns:
        Splits that are named after their classes, "0-1" first, in memory; inputs float32 [N, C, size, size] in [0, 1].

    Raises:
        UserError: `root` does not hold the data set, or `num_splits` does not divide its number of classes.
    """
    check_choice("dataset", dataset, get_args(Dataset))
    check_held_out(held_out)
    check_at_least("num_splits", num_splits, 1)
    if images_per_class is not None:
        check_at_least("images_per_class", images_per_class, 2)  # half as many are drawn of the test set
    check_at_least("seed", seed, 0)
    images, labels = _torchvision_arrays(dataset, root, train=True, download=download)
    generator = np.random.default_rng(seed)
    drawn = _draw(labels, images_per_class, generator)
    validation = _draw_share(labels, drawn, 0.2, generator)
    train = drawn[~torch.isin(drawn, validation)]
    evaluated = Part(images[validation], labels[validation], validation)
    if held_out == "test":
        test_images, test_labels = _torchvision_arrays(dataset, root, train=False, download=download)
        test = _draw(test_labels, None if images_per_class is None else images_per_class // 2, generator)
        evaluated = Part(test_images[test], test_labels[test], test + len(labels))
    classes = labels.unique()
    if len(classes) % num_splits:
        raise UserError(f"num_splits must divide the {len(classes)} classes of {dataset}, got {num_splits}")
    trained = Part(images[train], labels[train], train)
    return [_split(split_classes, trained, evaluated) for split_classes in classes.chunk(num_splits)]


def _split(classes: Tensor, train: Part, evaluated: Part) -> Split:
    def part_of_classes(part: Part) -> Part:
        is_selected = torch.isin(part.labels, classes)
        return Part(part.inputs[is_selected], part.labels[is_selected], part.ids[is_selected])

    held_out = part_of_classes(evaluated)
    return Split(f"{int(classes[0])}-{int(classes[-1])}", part_of_classes(train), query=held_out, gallery=held_out)


def _draw(labels: Tensor, per_class: int | None, generator: np.random.Generator) -> Tensor:
    """The sorted positions of at most `per_class` random items of every class; of all items for None."""
    drawn = [_shuffled((labels == label).nonzero()[:, 0], generator)[:per_class] for label in labels.unique()]
    return torch.cat(drawn).sort().values


def _draw_share(labels: Tensor, positions: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """A random share of the given positions of every class, sorted."""
    drawn = []
    for label in labels.unique():
        shuffled = _shuffled(positions[labels[positions] == label], generator)
        drawn.append(shuffled[: round(share * len(shuffled))])
    return torch.cat(drawn).sort().values


def _shuffled(positions: Tensor, generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.permutation(positions.numpy()))


def _torchvision_arrays(dataset: str, root: str | Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    import torchvision

    try:
        arrays = getattr(torchvision.datasets, dataset)(str(root), train=train, download=download)
    except Exception as error:  # for a damaged file one of many kinds
        raise _unreadable(dataset, root, reason_of(error), download=download) from None
    pixels = torch.as_tensor(arrays.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(arrays.targets).long()
    if len(labels) != len(pixels) or len(labels) == 0:
        raise UserError(f"{dataset} in {root} has {len(pixels)} images but {len(labels)} labels; its files are damaged")
    return pixels.float() / 255, labels


def _unreadable(dataset: str, root: str | Path, reason: str, *, download: bool) -> UserError:
    """The error for a data set that torchvision cannot read, because files are missing or because they are damaged."""
    from torchvision import datasets

    kind = getattr(datasets, dataset)
    if hasattr(kind, "base_folder"):  # the two CIFAR sets
        folder, names = Path(root) / kind.base_folder, [name for name, _ in (*kind.train_list, *kind.test_list)]
    else:
        folder, names = Path(root) / dataset / "raw", [Path(url).stem for url, _ in kind.resources]
    if all(os.path.isfile(folder / name) for name in names):
        return UserError(
            f"the files of {dataset} in {folder} are damaged ({reason}); remove the folder and set data.download=true"
        )
    remedy = "put its files there" if download else "set data.download=true"
    return UserError(f"torchvision does not find {dataset} in {root} ({reason}); {remedy}")
