"""Built-in data sets pass `check_dataset`; every rule is violated by one that fails it with the right message."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mas_embed import Part, Split, UserError, digits, image_folder, image_folders, image_manifest
from mas_embed.data import text_manifest
from mas_embed.facts.digits import fact_digits
from mas_embed.recognition import recognition
from mas_embed.testing import check_dataset


def write_images(root, folders, count=10):
    generator = np.random.default_rng(0)
    for name in folders:
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(generator.integers(0, 255, (8, 10, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


def test_digits():
    check_dataset(partial(digits, num_splits=10))


def test_folders_of_images(tmp_path):
    root = write_images(tmp_path / "classes", ["a", "b", "c", "d"])
    check_dataset(partial(image_folder, root=root, splits=2, image_size=8))
    check_dataset(partial(image_folder, root=root, splits=1, image_size=8, unseen_share=0.25))
    root = write_images(tmp_path / "splits", ["1/a", "1/b", "2/c", "2/d"])
    check_dataset(partial(image_folders, root=root, splits=2, image_size=8))


def test_lists(tmp_path):
    root = write_images(tmp_path, ["a", "b"])
    lines = [f"{path.relative_to(root)},{path.parent.name},s" for path in sorted(root.rglob("*.png"))]
    (root / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    check_dataset(partial(image_manifest, path=root / "list.csv", image_size=8))
    lines = [f"{topic} {index},{topic},s" for topic in ("sun", "sea") for index in range(20)]
    (root / "texts.csv").write_text("\n".join(["text,label,split", *lines]))
    check_dataset(partial(text_manifest, path=root / "texts.csv"))


def test_plug_ins():
    check_dataset(partial(fact_digits, train_images=2, held_out_images=2), has_duplicates=True)
    check_dataset(partial(recognition, sets=[{"name": "digits", "num_splits": 2}]))


# Rules that are violated


class Data:
    """Two splits of random points; a subclass breaks one rule. The first 12 items are for training, 4 for each other part."""

    def labels(self, split_index, count):
        return torch.arange(count) % 2 + 2 * split_index

    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs, labels, ids)

    def positions(self, held_out):
        return range(12), range(12, 16) if held_out == "test" else range(16, 20)

    def __call__(self, *, held_out: str = "test", seed: int = 0):
        if held_out not in ("test", "validation"):
            raise UserError(f"unknown {held_out}")
        generator = torch.Generator().manual_seed(seed)
        splits = []
        for split_index in range(2):
            inputs = torch.randn(20, 3, generator=generator)
            parts = []
            for is_train, positions in zip((True, False), self.positions(held_out), strict=True):
                ids = torch.tensor(list(positions)) + 100 * split_index
                labels = self.labels(split_index, len(positions))
                parts.append(self.part(inputs[list(positions)], labels, ids, is_train=is_train))
            splits.append(Split(f"s{split_index}", parts[0], parts[1], parts[1]))
        return splits


class Sequence(list):
    """Inputs in a list, for those that change when they are indexed."""


class WithAugmentation(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs, labels, ids, Noisy(inputs) if is_train else None)


class Noisy(Sequence):
    def __getitem__(self, index):
        return super().__getitem__(index) + torch.randn(3)


class WithoutIds(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs, labels)


class TrainsOnValidationItems(Data):
    """Under "test", as published protocols do."""

    def positions(self, held_out):
        return (range(16), range(16, 20)) if held_out == "test" else (range(12), range(12, 16))


@pytest.mark.parametrize("data", [Data, WithAugmentation, WithoutIds, TrainsOnValidationItems])
def test_a_data_set_that_breaks_no_rule(data):
    check_dataset(data())
    check_dataset(partial(data(), held_out="validation"))


class HasNoItems(Data):
    def positions(self, held_out):
        return range(12), range(0)


class HasNegativeLabels(Data):
    def labels(self, split_index, count):
        return super().labels(split_index, count) - 1


class Draws(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs + torch.rand(()), labels, ids)


class NamesAtRandom(Data):
    def __call__(self, *, held_out="test"):
        return [Split(f"{one.name} {random.random()}", one.train, one.query, one.gallery) for one in super().__call__()]


class HasNoCleanView(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(CountsReads(inputs), labels, ids)


class CountsReads(Sequence):
    reads = 0

    def __getitem__(self, index):
        CountsReads.reads += 1
        return super().__getitem__(index) + CountsReads.reads


class Reads(Part):
    def __getitem__(self, index):
        return self.inputs[index], int(self.labels[0])


class MixesLabels(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Reads(inputs, labels, ids)


class HasItemsOfAnySize(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part([row[: 1 + index % 2] for index, row in enumerate(inputs)], labels, ids)


class OwnGenerator(Sequence):
    generator = np.random.default_rng(0)

    def __getitem__(self, index):
        return super().__getitem__(index) + self.generator.random()


class DrawsByItself(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs, labels, ids, OwnGenerator(inputs) if is_train else None)


class Unpicklable(Sequence):
    def __init__(self, values):
        super().__init__(values)
        self.function = lambda value: value


class HoldsAFunction(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(Unpicklable(inputs), labels, ids)


class NumbersEverySplit(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(inputs, labels, ids % 100)


class TrainsOnTestItems(Data):
    def positions(self, held_out):
        return range(13), range(12, 16) if held_out == "test" else range(16, 20)


class TrainsOnThemWithoutIds(TrainsOnTestItems, WithoutIds):
    pass


class ReturnsTheTestItems(Data):
    def positions(self, held_out):
        return super().positions("test")


class TrainsOnTestItemsForValidation(Data):
    def positions(self, held_out):
        return (range(12), range(12, 16)) if held_out == "test" else (range(13), range(16, 20))


class RenamesSplits(Data):
    def __call__(self, *, held_out: str = "test"):
        splits = super().__call__(held_out=held_out)
        return [Split(f"{one.name} {held_out}", one.train, one.query, one.gallery) for one in splits]


class AcceptsAnything(Data):
    def __call__(self, *, held_out: str = "test"):
        return super().__call__(held_out="test" if held_out == "test" else "validation")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (HasNoItems, "must return splits that can be trained on: split 's0' has an empty query part"),
        (HasNegativeLabels, "labels must be at least 0, but train of split 's0' has -1"),
        (Draws, "whatever the state of the global random generators; train of split 's0' differs"),
        (NamesAtRandom, "must give splits of the same names"),
        (HasNoCleanView, "the clean view must be the same each time it is read, but train of split 's0' changes"),
        (MixesLabels, r"item i of a part must be \(inputs\[i\], labels\[i\]\), but item 11"),
        (HasItemsOfAnySize, "must be put together in batches, but those of the clean view of train"),
        (DrawsByItself, "a worker process must give the same batches, but those of the training view"),
        (HoldsAFunction, "must be picklable"),
        (NumbersEverySplit, "an id must stand for one input in all parts, but id 0 stands for two"),
        (TrainsOnTestItems, "held-out items must not be trained on, but 2 are, such as that with id 12"),
        (TrainsOnThemWithoutIds, "held-out items must not be trained on, but 2 have the values of such an item"),
        (ReturnsTheTestItems, "held out for testing must not be held out for validation, but 8 are"),
        (TrainsOnTestItemsForValidation, "test items must not be trained on under held_out='validation', but 2 are"),
        (RenamesSplits, "held_out must not change the names"),
        (AcceptsAnything, "held_out must be 'test' or 'validation', but another word is accepted"),
    ],
)
def test_a_broken_data_set_is_reported(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_dataset(broken())


class HasEqualItems(Data):
    def part(self, inputs, labels, ids, *, is_train):
        return Part(torch.zeros_like(inputs), labels, ids)


def test_equal_items_are_told_apart_by_their_ids():
    with pytest.raises(AssertionError, match="give each an id and pass has_duplicates=True"):
        check_dataset(HasEqualItems())
    check_dataset(HasEqualItems(), has_duplicates=True)
