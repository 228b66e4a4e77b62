import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from data.photographs import read_image, red, write_classes, write_photograph
from PIL import Image
from torchvision.transforms import v2

from mas_embed import Recipe, UserError, fingerprint_of, train_sequence, training_batches
from mas_embed.data import image_folder, image_folders, transform_splits
from mas_embed.data import images as images_module

SIZES = {"apple": 12, "banana": 9, "cherry": 8, "date palm": 4, "Äpfel & Birnen": 10}


@pytest.fixture
def photographs(tmp_path):
    return write_classes(tmp_path / "my photographs", SIZES)


def reds(part):
    return [red(image) for image in part.inputs]


def test_classes_are_dealt_into_splits_in_alphabetical_order(photographs):
    splits = image_folder(root=photographs, splits=2, image_size=8)
    assert [split.name for split in splits] == ["1", "2"]
    assert list(splits.label_names) == ["apple", "banana", "cherry", "date palm", "Äpfel & Birnen"]
    assert [split.train.labels.unique().tolist() for split in splits] == [[0, 1, 2], [3, 4]]
    assert splits[0].train.inputs[0].shape == (3, 8, 8) and splits[0].train.inputs[0].dtype == torch.float32
    for split in splits:
        assert split.query is split.gallery
        for part in (split.train, split.query):
            assert [value // 20 for value in reds(part)] == part.labels.tolist()
    ids = torch.cat([part.ids for split in splits for part in (split.train, split.query)])
    assert len(ids.unique()) == len(ids)


def test_at_least_two_images_of_a_class_are_held_out(photographs):
    parts = {
        part: image_folder(root=photographs, splits=1, image_size=8, held_out=part) for part in ("test", "validation")
    }
    counts = {
        name: Counter(split.query.labels.tolist()) | {"train": len(split.train)} for name, (split,) in parts.items()
    }
    assert counts["test"] == {0: 3, 1: 2, 2: 2, 3: 2, 4: 2, "train": 12 - 5 + 9 - 4 + 8 - 4 + 4 - 2 + 10 - 4}
    assert counts["validation"] == {0: 2, 1: 2, 2: 2, 4: 2, "train": counts["test"]["train"]}
    train, test, validation = (
        set(part.ids.tolist())
        for part in (parts["test"][0].train, parts["test"][0].query, parts["validation"][0].query)
    )
    assert not train & test and not train & validation and not test & validation


def test_classes_are_dealt_at_random_or_by_name(photographs):
    def names(**options):
        splits = image_folder(root=photographs, image_size=8, **options)
        by_label = {label: name for name, (label,) in splits.label_names.items()}
        return {split.name: [by_label[label] for label in split.train.labels.unique().tolist()] for split in splits}

    one, two = (names(splits=2, order="random", seed=seed) for seed in (0, 3))
    assert one != two and one == names(splits=2, order="random", seed=0)
    assert names(splits=[["cherry"], ["banana", "apple"]]) == {"1": ["cherry"], "2": ["banana", "apple"]}
    named = {"old": ["apple"], "new": ["Äpfel & Birnen"]}
    assert names(splits=named) == named


def test_a_class_that_comes_back_brings_other_images(photographs):
    first, second = image_folder(root=photographs, splits=[["apple", "banana"], ["apple", "cherry"]], image_size=8)
    of_first, of_second = (
        {value for part in (split.train, split.query) for value in reds(part) if value < 20}
        for split in (first, second)
    )
    assert len(of_first) == len(of_second) == 4  # of six; two are held out for validation
    assert not of_first & of_second
    assert 0 in first.train.labels and 0 in second.train.labels


def test_reserved_classes_are_told_from_others(photographs):
    def classes(held_out_classes):
        (split,) = image_folder(
            root=photographs, splits=1, image_size=8, unseen_share=0.2, held_out_classes=held_out_classes
        )
        return set(split.train.labels.tolist()), set(split.query.labels.tolist())

    trained, both = classes("both")
    assert len(trained) == 3 and len(both) == 4
    assert classes("seen") == (trained, trained)
    assert classes("unseen") == (trained, both - trained)
    with pytest.raises(UserError, match="no image of the part 'test of unseen classes' in the split '1'"):
        image_folder(root=photographs, splits=1, image_size=8, held_out_classes="unseen")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "nowhere"}, "there is no folder nowhere"),
        ({"splits": 6}, "has 5 classes, too few for 6 splits"),
        ({"splits": 0}, "splits, unless it lists classes, must be a whole number >= 1, got 0"),
        ({"splits": [["aple"]]}, "unknown class of .* 'aple': did you mean 'apple'"),
        ({"splits": [["apple", "apple"]]}, "the split '1' lists the class 'apple' twice"),
        ({"splits": {"a": []}}, r"the split 'a' must be a list of at least one class, got \[\]"),
        ({"order": "sorted"}, "order must be 'listed' or 'random'"),
        ({"held_out_classes": "all"}, "held_out_classes must be 'both', 'seen' or 'unseen'"),
        ({"unreadable": "ignore"}, "unreadable must be 'error', 'skip' or 'unchecked'"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"image_size": 8, "short_side": 4}, "1 <= size <= short_side"),
    ],
)
def test_options_that_are_not_accepted(photographs, options, message):
    with pytest.raises(UserError, match=message):
        image_folder(**{"root": photographs, "splits": 1} | options)


# Dirt


def test_what_systems_leave_behind_is_ignored(photographs):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "apple/.DS_Store", "apple/Thumbs.db", "apple/._00.png"):
        (photographs / name).write_bytes(b"\0\0\0\1Bud1")
    (photographs / "__MACOSX").mkdir()
    (photographs / ".git").mkdir()
    (split,) = image_folder(root=photographs, splits=1, image_size=8)
    assert len(split.train) == 24


def test_empty_and_small_classes_and_other_files_are_warned_of(photographs):
    (photographs / "empty").mkdir()
    write_photograph(photographs / "lonely" / "0.png", 110)
    (photographs / "apple" / "notes.txt").write_text("sweet")
    (photographs / "apple" / "more").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (split,) = image_folder(root=photographs, splits=1, image_size=8)
    messages = [str(one.message) for one in caught]
    assert ["folders without an image are left out of" in m and m.endswith(": empty") for m in messages] == [
        True,
        False,
        False,
    ]
    assert "2 entries" in messages[1] and "a folder (1), .txt (1); such as apple/more" in messages[1]
    assert "1 of 6 classes" in messages[2] and "fewer than 4 images, so none of them is held out: lonely" in messages[2]
    assert {110} < set(reds(split.train))


def test_images_of_every_kind_are_read(tmp_path):
    kinds = {
        "one.JPG": {},
        "two words.jpeg": {},
        "drei größe.png": {},
        "cmyk.jpg": {"mode": "CMYK"},
        "grey.jpeg": {"mode": "L"},
        "palette.png": {"mode": "P"},
        "alpha.png": {"mode": "RGBA"},
        "dot.png": {"size": (1, 1)},
        "line.png": {"size": (1, 400)},
        "tagged.TIFF": {},
        "moving.gif": {},
        "web.webp": {"lossless": True},
    }
    for name, options in kinds.items():
        write_photograph(tmp_path / "a" / name, 100, **options)
    Image.fromarray(np.full((9, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "a" / "deep.png")
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 100, 155, 50])
    palette.save(tmp_path / "a" / "transparent.png", transparency=b"\x00\x80")
    (split,) = image_folder(root=tmp_path, splits=1, image_size=8)
    values = {
        path.name: red(split_part.inputs[index])
        for split_part in (split.train, split.query)
        for index, path in enumerate(split_part.inputs.paths)
    }
    grey = values.pop("grey.jpeg", 128)  # of all three colours together
    assert abs(grey - 128) < 30
    assert all(abs(value - 100) <= 4 for value in values.values()), values


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    found = read_image(tmp_path / "a.png", size=8, short_side=8).permute(1, 2, 0).numpy()
    assert (found == upright).all()


def test_an_unreadable_image_is_named_or_skipped_or_met_later(photographs):
    whole = write_photograph(photographs / "apple" / "torn.JPG", 7, size=(64, 64))
    whole.write_bytes(whole.read_bytes()[:400])
    with pytest.raises(
        UserError, match=r"cannot read the image .*torn.JPG: .*truncated; remove it, or .*unreadable=skip"
    ):
        image_folder(root=photographs, splits=1, image_size=8)
    (photographs / "banana" / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"torn.JPG: .*; and 1 more; remove it"):
        image_folder(root=photographs, splits=1, image_size=8)
    with pytest.warns(
        UserWarning, match=r"2 of 45 images are left out because they are unreadable: .*torn.JPG.*, \.\.\."
    ):
        (split,) = image_folder(root=photographs, splits=1, image_size=8, unreadable="skip")
    assert len(split.train) == 24
    (split,) = image_folder(root=photographs, splits=1, image_size=8, unreadable="unchecked")
    with pytest.raises(UserError, match="cannot read the image"):
        list(split.train.inputs), list(split.query.inputs)


def test_an_image_that_was_read_before_is_not_checked_again(photographs, monkeypatch):
    image_folder(root=photographs, splits=1, image_size=8)
    monkeypatch.setattr(images_module, "read_scaled_image", None)
    image_folder(root=photographs, splits=2, image_size=8)


def test_a_layout_with_splits_is_recognised(tmp_path):
    write_classes(tmp_path / "january", {"a": 8, "b": 8})
    with pytest.raises(UserError, match="for <root>/<split>/<class>/<image> take the data set folders"):
        image_folder(root=tmp_path, splits=1)
    (tmp_path / "flat").mkdir()
    write_photograph(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="holds no folder of images"):
        image_folder(root=tmp_path / "flat", splits=1)


def test_names_that_look_the_same(photographs):
    splits = image_folder(root=photographs, splits=[["A\u0308pfel & Birnen"]], image_size=8)
    assert list(splits.label_names) == ["Äpfel & Birnen"]
    write_photograph(photographs / "A\u0308pfel & Birnen" / "0.png")
    with pytest.raises(UserError, match="holds two folders with the name 'Äpfel & Birnen'; rename one"):
        image_folder(root=photographs, splits=1)


# Splits as folders


def test_a_class_comes_back_in_folders_of_the_same_name(tmp_path):
    for split in ("january", "february"):
        write_classes(tmp_path / split, {"a": 8, "b": 8})
    (tmp_path / ".hidden").mkdir()
    own = image_folders(root=tmp_path, splits=2, image_size=8)
    shared = image_folders(root=tmp_path, splits=2, image_size=8, shared_classes=True)
    assert [split.name for split in own] == ["february", "january"]
    assert list(own.label_names) == ["february/a", "february/b", "january/a", "january/b"]
    assert shared.label_names == {"a": [0], "b": [1]}
    assert shared[0].train.labels.tolist() == shared[1].train.labels.tolist()
    (tmp_path / "january" / "c").mkdir()
    with pytest.warns(UserWarning, match="folders without an image are left out of .*: january/c"):
        image_folders(root=tmp_path, splits=2, image_size=8)


# Workers, caches and views


def test_worker_processes_share_one_bounded_cache(photographs, monkeypatch):
    (split,) = image_folder(root=photographs, splits=1, image_size=8, unreadable="unchecked")
    with_cache = list(training_batches(split.train, batch_size=4, num_workers=2))
    assert len(with_cache) == 6
    monkeypatch.setattr(images_module, "read_scaled_image", None)  # what the workers have decoded is here
    again = torch.cat([inputs for inputs, _ in training_batches(split.train, batch_size=4, view="clean")])
    assert torch.equal(
        again.sum((1, 2, 3)).sort().values, torch.cat([i for i, _ in with_cache]).sum((1, 2, 3)).sort().values
    )


def test_a_cache_that_is_full_stores_nothing_more(photographs, monkeypatch):
    (split,) = image_folder(root=photographs, splits=1, image_size=300, keep_megabytes=1)
    stored = [image for image in range(43) if split.train.inputs._cache.get(image) is not None]
    assert len(stored) == 3  # of 3 x 300 x 360 bytes
    (split,) = image_folder(root=photographs, splits=1, image_size=8, keep_megabytes=0)
    assert split.train.inputs[0] is not None and split.train.inputs._cache.get(0) is None


def test_a_random_crop_is_taken_from_the_whole_image(tmp_path):
    for index in range(4):
        pixels = np.zeros((10, 30, 3), dtype=np.uint8)
        pixels[:, :8] = 255  # outside of the centre
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{index}.png")
    splits = image_folder(root=tmp_path, splits=1, image_size=8)
    assert float(splits[0].train.inputs[0].max()) == 0
    (split,) = transform_splits(splits, augment=[v2.RandomCrop(8)], normalize=None)
    torch.manual_seed(0)
    crops = torch.stack([split.train.augmented[0] for _ in range(20)])
    assert (
        crops.shape == (20, 3, 8, 8)
        and crops.dtype == torch.float32
        and float(crops.max()) == 1
        and float(crops.min()) == 0
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_training_on_photographs_is_the_same_for_any_number_of_workers(photographs, channels):
    from small import pull_together
    from torch import nn

    from mas_embed import Replay

    prints = []
    for num_workers in (0, 2):
        splits = transform_splits(
            image_folder(root=photographs, splits=2, image_size=8, channels=channels),
            augment=[v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2)],
            normalize="data",
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 4))
        recipe = Recipe(epochs=2, batch_size=8, num_workers=num_workers)
        method = Replay(model, buffer_size=10)
        train_sequence(model, splits, method=method, loss=pull_together, recipe=recipe)
        prints.append(fingerprint_of(model))
    assert prints[0] == prints[1]
