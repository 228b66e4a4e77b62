import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mas_embed import UserError
from mas_embed.data import image_folders, torchvision_images


@pytest.fixture
def alphabets(tmp_path):
    """Three splits of five classes of twelve images; the mean of an image identifies its class."""
    for split_index, split in enumerate(("beta", "alpha", "gamma")):
        for character in range(5):
            folder = tmp_path / split / f"character{character}"
            folder.mkdir(parents=True)
            for number in range(12):
                value = 20 * (split_index + 1) + 2 * character
                Image.fromarray(np.full((9, 11), value, dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path


def means(part):
    return [round(float(image.mean()) * 255) for image in part.inputs]


def test_a_folder_is_a_split_and_its_folders_are_classes(alphabets):
    splits = image_folders(root=alphabets, splits=3, image_size=8)
    assert [split.name for split in splits] == ["alpha", "beta", "gamma"]
    assert [len(part) for part in (splits[0].train, splits[0].query)] == [
        5 * 7,
        5 * 3,
    ]  # 3 of 12 for testing, at least 2 for validation
    assert splits[1].query is splits[1].gallery
    labels = torch.cat([split.train.labels for split in splits])
    assert labels.unique().tolist() == list(range(15))
    for split, base in zip(splits, (40, 20, 60), strict=True):
        first = int(split.train.labels.min())
        assert means(split.train) == [base + 2 * (int(label) - first) for label in split.train.labels]
    ids = torch.cat([part.ids for split in splits for part in (split.train, split.query)])
    assert len(ids.unique()) == len(ids)


def test_named_splits_are_in_the_given_order_and_in_colour(alphabets):
    splits = image_folders(root=alphabets, splits=["gamma", "beta"], image_size=8, channels=3)
    assert [split.name for split in splits] == ["gamma", "beta"]
    assert splits[0].train.inputs[0].shape == (3, 8, 8)


def test_unseen_classes_are_evaluated_and_never_trained_on(alphabets):
    options = {"root": alphabets, "splits": 2, "image_size": 8, "unseen_share": 0.2}
    test, validation = (image_folders(**options, held_out=part) for part in ("test", "validation"))
    for one, other in zip(test, validation, strict=True):
        unseen = set(one.query.labels.tolist()) - set(one.train.labels.tolist())
        unseen_in_validation = set(other.query.labels.tolist()) - set(other.train.labels.tolist())
        assert len(unseen) == len(unseen_in_validation) == 1
        assert not unseen & unseen_in_validation
        assert not unseen & set(other.query.labels.tolist())
        assert (one.query.labels == unseen.pop()).sum() == 12
        assert not set(one.query.ids.tolist()) & set(other.query.ids.tolist())
        assert one.train.ids.tolist() == other.train.ids.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, "there is no folder nowhere"),
        ({"splits": 4}, "data.splits asks for 4 folders, but .* holds alpha, beta, gamma"),
        ({"splits": ["delta"]}, "data.splits asks for 'delta', but .* holds alpha, beta, gamma"),
        ({"unseen_share": 0.9}, "unseen_share must be from 0 to 0.4"),
        ({"held_out": "train"}, "held_out must be 'test' or 'validation'"),
    ],
)
def test_errors(alphabets, options, message):
    with pytest.raises(UserError, match=message):
        image_folders(**{"root": alphabets, "splits": 3} | options)


def test_a_file_that_is_not_an_image_is_named(alphabets):
    broken = alphabets / "alpha" / "character0" / "3.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*3\.png"):
        image_folders(root=alphabets, splits=1)


def test_a_split_with_few_images_is_refused(alphabets):
    for path in list((alphabets / "alpha" / "character0").iterdir())[:6]:
        path.unlink()
    with pytest.raises(UserError, match="at least 8 images each"):
        image_folders(root=alphabets, splits=1)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + b"".join(struct.pack(">I", size) for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path):
    """The files of torchvision; the first pixel of an image identifies its class, the second its position."""
    for prefix, count in (("train", 200), ("t10k", 100)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28))
        images[:, 0, 0], images[:, 0, 1] = labels, np.arange(count)
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


def test_classes_of_a_torchvision_set_are_divided_in_order(fashion):
    splits = torchvision_images(dataset="FashionMNIST", root=fashion)
    assert [split.name for split in splits] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    for index, split in enumerate(splits):
        assert len(split.train) == 2 * 16
        assert len(split.query) == 2 * 10
        for part in (split.train, split.query):
            assert set(part.labels.tolist()) == {2 * index, 2 * index + 1}
            assert (part.inputs[:, 0, 0, 0] * 255).round().long().tolist() == part.labels.tolist()
    assert splits[0].query.ids.min() >= 200


def test_validation_is_taken_from_the_training_set_alone(fashion):
    test = torchvision_images(dataset="FashionMNIST", root=fashion, images_per_class=10)
    validation = torchvision_images(dataset="FashionMNIST", root=fashion, images_per_class=10, held_out="validation")
    for one, other in zip(test, validation, strict=True):
        assert one.train.ids.tolist() == other.train.ids.tolist()
        assert (len(one.train), len(one.query), len(other.query)) == (16, 10, 4)
        assert not set(one.train.ids.tolist()) & set(other.query.ids.tolist())
        assert max(other.query.ids.tolist()) < 200 <= min(one.query.ids.tolist())


def test_errors_of_a_torchvision_set(fashion, tmp_path):
    with pytest.raises(UserError, match="dataset must be 'MNIST', .* or 'CIFAR100', got 'SVHN'"):
        torchvision_images(dataset="SVHN", root=tmp_path)
    with pytest.raises(UserError, match=r"torchvision does not find MNIST in .*; set data.download=true"):
        torchvision_images(dataset="MNIST", root=tmp_path / "empty")
    with pytest.raises(UserError, match="num_splits must divide the 10 classes"):
        torchvision_images(dataset="FashionMNIST", root=fashion, num_splits=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": -1}, "splits, unless it is a list of names, must be a whole number >= 1, got -1"),
        ({"splits": 0}, "splits, unless it is a list of names, must be a whole number >= 1, got 0"),
        ({"image_size": 0}, "image_size must be from 1 to 16384, got 0"),
        ({"image_size": 10**9}, "image_size must be from 1 to 16384, got 1000000000"),
        ({"unseen_share": float("nan")}, "unseen_share must be from 0 to 0.4, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(alphabets, options, message):
    with pytest.raises(UserError, match=message):
        image_folders(root=alphabets, **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: b"\0\0\x0d" + content[3:],  # floats
        lambda content: content[:2] + b"\x55" + content[3:],
        lambda content: b"no idx file",
    ],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_files_of_a_torchvision_set_are_called_so(fashion, name, damage):
    path = fashion / "FashionMNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"FashionMNIST in .*raw are damaged \(.*\); remove the folder and set data.download"
    ):
        torchvision_images(dataset="FashionMNIST", root=fashion)


def test_fewer_labels_than_images_and_files_with_a_wrong_checksum(fashion, tmp_path):
    write_idx(fashion / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte", np.arange(10))
    with pytest.raises(UserError, match="has 200 images but 10 labels; its files are damaged"):
        torchvision_images(dataset="FashionMNIST", root=fashion)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    with pytest.raises(UserError, match=r"does not find CIFAR10 in .*; set data.download=true"):
        torchvision_images(dataset="CIFAR10", root=tmp_path)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"files of CIFAR10 in .*cifar-10-batches-py are damaged"):
        torchvision_images(dataset="CIFAR10", root=tmp_path)


@pytest.mark.parametrize("options", [{"images_per_class": -3}, {"num_splits": 0}, {"seed": -1}])
def test_numbers_of_a_torchvision_set_below_their_range_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} must be at least"):
        torchvision_images(dataset="MNIST", root=tmp_path, **options)
