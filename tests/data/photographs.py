"""Small photographs for tests: files of one colour, by which they are recognised, and copies of published layouts."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from mas_embed.data import ImageFiles


def write_photograph(path, value=128, size=(12, 10), mode="RGB", **options):
    """Writes an image of one colour; its red is the value."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[:] = (value, 255 - value, value // 2)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def red(image):
    """The value that an image was written with, up to what JPEG loses."""
    return round(float(image[0].mean()) * 255)


def read_image(path, *, size, short_side):
    """The bytes of an image as `ImageFiles` prepares it, uint8 [3, size, size]."""
    image = ImageFiles([path], size=size, short_side=short_side)[0]
    return (image * 255).round().to(torch.uint8)


def write_classes(root, sizes, suffix=".png"):
    """Folders of classes, each with that many images; the red of an image is 10 times its class plus its number."""
    for index, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(size):
            write_photograph(root / name / f"{number:02}{suffix}", 20 * index + number)
    return root


def write_birds(folder, *, num_classes=4, num_train=3, num_test=2):
    """A copy of the layout of CUB-200-2011; the first images of a class are for training, the red of an image is its number."""
    root, lists = folder / "CUB_200_2011", {"images": [], "image_class_labels": [], "train_test_split": []}
    classes = [f"{label:03}.Bird {label}" for label in range(1, num_classes + 1)]
    for label, name in enumerate(classes, 1):
        for index in range(num_train + num_test):
            number = len(lists["images"]) + 1
            link = f"{name}/Bird_{index}.jpg"
            write_photograph(root / "images" / link, number % 256, quality=95)
            lists["images"].append(f"{number} {link}")
            lists["image_class_labels"].append(f"{number} {label}")
            lists["train_test_split"].append(f"{number} {int(index < num_train)}")
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n" * (name == "images"))
    (root / "classes.txt").write_text("".join(f"{label} {name}\n" for label, name in enumerate(classes, 1)))
    return folder


def write_flowers(folder, *, num_classes=4, num_each=2, step=9):
    """A copy of the layout of Flowers-102, with as many images of a class in every part; the red of an image is a multiple of
    its number."""
    root, size = folder / "flowers-102", 3 * num_each
    for number in range(1, num_classes * size + 1):
        write_photograph(root / "jpg" / f"image_{number:05}.jpg", step * number)
    savemat(root / "imagelabels.mat", {"labels": np.repeat(np.arange(1, num_classes + 1), size)})
    parts = np.arange(1, num_classes * size + 1).reshape(num_classes, 3, num_each)
    names = ("trnid", "valid", "tstid")
    savemat(root / "setid.mat", {name: parts[:, index].ravel() for index, name in enumerate(names)})
    return folder
