"""Trains on folders of images, `<root>/<split>/<class>/<image>`, with and without MAS.

    python examples/your_own_images.py [ROOT]

Without ROOT the script writes three splits of scikit-learn's digits as image files itself, in a temporary directory.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_metric_learning.losses import TripletMarginLoss
from sklearn.datasets import load_digits

import mas_embed as me


def write_images(root: Path, num_splits: int = 3) -> None:
    """Writes 60 images of 16x16 pixels for each of two digits in each split."""
    digits = load_digits()
    for split, label in np.ndindex(num_splits, 2):
        digit = 2 * split + label
        folder = root / f"month{split + 1}" / f"digit{digit}"
        folder.mkdir(parents=True)
        for index, pixels in enumerate(digits.images[digits.target == digit][:60]):
            Image.fromarray((pixels * 15).astype(np.uint8)).resize((16, 16)).save(folder / f"{index}.png")


def main(root: Path) -> None:
    """Learns the folders of `root` one after another with two methods."""
    num_splits = len([folder for folder in root.iterdir() if folder.is_dir()])
    splits = me.image_folders(root=root, splits=num_splits, image_size=16)
    print("splits:", ", ".join(f"{split.name} ({len(split.train)} training images)" for split in splits))
    evaluator = me.RetrievalEvaluator(follow_index=False)
    recipe = me.Recipe(epochs=10, batch_size=32, sampler=partial(me.per_class_sampler, m=4))
    for make_method in (me.Finetune, partial(me.MAS, strength=3, normalize=True, embed="unnormalized")):
        with me.seeded(0):
            model = me.small_conv()
        method = make_method(model)
        result = me.train_sequence(
            model, splits, method=method, loss=TripletMarginLoss(), recipe=recipe, evaluator=evaluator
        )
        scores = result.scores["mean_average_precision"]
        print(f"{method.name:<8}  final average {scores.final_average:.3f}  forgetting {scores.forgetting:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder))
            main(Path(folder))
