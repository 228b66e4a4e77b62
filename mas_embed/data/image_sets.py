"""Folders of images, and torchvision's data sets, as sequences of splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mas_embed.data.digits import DATASETS, HeldOut, check_held_out, partition
from mas_embed.data.images import read_image
from mas_embed.data.split import Part, Split
from mas_embed.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
Dataset = Literal["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"]


@DATASETS.register("folders")
def image_folders(
    *,
    root: str | Path,
    splits: list[str] | int = 5,
    image_size: int = 28,
    channels: Literal[1, 3] = 1,
    unseen_share: float = 0.0,
    held_out: HeldOut = "test",
    seed: int = 0,
) -> list[Split]:
    """Images in folders `<root>/<split>/<class>/<image>`, such as Omniglot's alphabets and characters.

    Of every class a quarter of the images is the test part, a fifth of the rest the validation part, and what remains is
    trained on. Of the classes of a split, `unseen_share` are never trained on under "test" and as many others under
    "validation": all their images are held out, so that queries and gallery hold new classes too. Held-out images are
    queries and gallery at once.

    Args:
        root: the folder of the splits' folders.
        splits: their names in the order in which they are learned, or how many of them, in alphabetical order.
        image_size: pixels a side; the shorter side is scaled to it, and the centre cut out.
        channels: 1 (mean of the colours) or 3.
        unseen_share: from 0 to 0.4.
        held_out: what the splits are judged by: "test" for figures that are reported, "validation" for choosing
            options.
        seed: of the partition.

    Returns:
        Inputs float32 [N, channels, image_size, image_size] in [0, 1], in memory.

    Raises:
        UserError: there is no such folder, a split has no class with at least 8 images, or a file is no readable image.
    """
    check_held_out(held_out)
    if not 0 <= unseen_share <= 0.4:
        raise UserError(f"unseen_share must be from 0 to 0.4, got {unseen_share}")
    generator, sequence, num_classes, num_items = np.random.default_rng(seed), [], 0, 0
    for folder in _split_folders(Path(root), splits):
        files = _files_by_class(folder)
        labels = torch.repeat_interleave(
            torch.arange(num_classes, num_classes + len(files)), torch.tensor([len(own) for own in files])
        )
        images = torch.stack([_image(path, image_size, channels) for own in files for path in own])
        train, held = partition(labels, held_out, seed)
        tested, validated = _unseen_classes(labels.unique(), unseen_share, generator)
        hidden, extra = (tested, validated) if held_out == "test" else (validated, tested)
        is_trained = ~torch.isin(labels[train], torch.cat([hidden, extra]))
        is_judged = ~torch.isin(labels[held], extra)
        judged = torch.cat([held[is_judged], torch.isin(labels, hidden).nonzero()[:, 0]]).unique()
        sequence.append(_split(folder.name, images, labels, train[is_trained], judged, first_id=num_items))
        num_classes, num_items = num_classes + len(files), num_items + len(labels)
    return sequence


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


def _split(name: str, images: Tensor, labels: Tensor, train: Tensor, judged: Tensor, *, first_id: int) -> Split:
    held_out = Part(images[judged], labels[judged], judged + first_id)
    return Split(name, Part(images[train], labels[train], train + first_id), held_out, held_out)


def _unseen_classes(classes: Tensor, share: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Classes that are new when testing, and others that are new when validating; as many each."""
    number = round(share * len(classes))
    order = torch.from_numpy(generator.permutation(classes.numpy()))
    return order[:number], order[number : 2 * number]


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


def _split_folders(root: Path, splits: Sequence[str] | int) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; data.root must hold a folder for every split")
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    names = list(found)[:splits] if isinstance(splits, int) else list(splits)
    missing = [name for name in names if name not in found]
    if missing or not names or (isinstance(splits, int) and len(names) < splits):
        wanted = f"{splits} folders" if isinstance(splits, int) else f"'{missing[0]}'" if missing else "a split"
        raise UserError(f"{root} has no {wanted} for data.splits; it has {', '.join(found) or 'no folder'}")
    return [found[name] for name in names]


def _files_by_class(folder: Path) -> list[list[Path]]:
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    files = [sorted(path for path in own.iterdir() if path.suffix.lower() in SUFFIXES) for own in classes]
    if len(files) < 2 or min(map(len, files)) < 8:
        raise UserError(
            f"the split {folder} must hold at least two folders of classes, with at least 8 images each "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return files


def _image(path: Path, size: int, channels: int) -> Tensor:
    pixels = read_image(path, size=size, short_side=size).float() / 255
    return pixels.mean(0, keepdim=True) if channels == 1 else pixels
