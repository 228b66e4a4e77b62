"""Small photographs for tests: files of one colour, by which they are recognised."""

from pathlib import Path

import numpy as np
from PIL import Image


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


def write_classes(root, sizes, suffix=".png"):
    """Folders of classes, each with that many images; the red of an image is 10 times its class plus its number."""
    for index, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(size):
            write_photograph(root / name / f"{number:02}{suffix}", 20 * index + number)
    return root
