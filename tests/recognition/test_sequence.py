"""Data sets joined to a sequence: labels, names, images of one size, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from mas_embed import DATASETS, Part, Split, SplitSequence, UserError, digits
from mas_embed.data import ImageFiles, check_splits, fingerprint_of_split, join_splits, select_subset
from mas_embed.recognition import recognition
from mas_embed.recognition.images import RGBImages, as_rgb, rgb_inputs


def split_of(labels, query_labels, *, size=(4, 4), channels=1, name="s", value=0.5):
    train = Part(torch.full((len(labels), channels, *size), value), labels)
    query = Part(torch.full((len(query_labels), channels, *size), value), query_labels)
    return Split(name, train, query, query)


@pytest.fixture
def sets(monkeypatch):
    """Registers data sets for one test."""

    def register(**constructors):
        for name, constructor in constructors.items():
            monkeypatch.setitem(DATASETS._components, name, constructor)

    return register


def birds(*, root="", num_classes=3, held_out="test", seed=0):
    labels = torch.arange(num_classes).repeat_interleave(4) * 10 + 7
    part = split_of(labels, labels[::2] if held_out == "test" else labels[1::4], name=f"{root}{seed}")
    names = {f"bird {index}": [10 * index + 7] for index in range(num_classes)}
    return SplitSequence([part], label_names=names)


def cars(*, num_splits=2):
    return [
        split_of(torch.tensor([5, 3, 3]), torch.tensor([3]), name=str(i), channels=3, size=(3, 9))
        for i in range(num_splits)
    ]


def test_every_data_set_is_one_split_with_labels_of_its_own(sets):
    sets(birds=birds, cars=cars)
    splits = recognition(
        sets=["birds", {"name": "cars", "title": "old cars"}, {"name": "digits", "num_splits": 2}], image_size=6
    )
    check_splits(splits)
    assert [split.name for split in splits] == ["birds", "old cars", "digits"]
    assert splits.provides["classes_per_split"] == [3, 2, 10]
    assert splits.provides["class_names"] == [
        ["bird 0", "bird 1", "bird 2"],
        ["3", "5"],
        [str(digit) for digit in range(10)],
    ]
    assert splits[0].train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert splits[1].train.labels.tolist() == [4, 3, 3] * 2
    assert splits[1].query.labels.tolist() == [3, 3]
    expected = join_splits(digits(num_splits=2))
    assert splits[2].train.labels.tolist() == (expected.train.labels + 5).tolist()
    assert splits[2].query is splits[2].gallery
    for split in splits:
        for part in (split.train, split.query):
            assert torch.stack([image for image, _ in part]).shape == (len(part), 3, 6, 6)


def test_the_splits_of_a_data_set_may_stay_apart(sets):
    sets(cars=cars)
    splits = recognition(
        sets=[{"name": "digits", "join": False}, {"name": "cars", "join": False, "title": "cars"}], image_size=8
    )
    assert [split.name for split in splits] == ["0-1", "2-3", "4-5", "6-7", "8-9", "cars 0", "cars 1"]
    assert splits.provides["classes_per_split"] == [2] * 7
    assert splits[6].train.labels.tolist() == [13, 12, 12]
    assert splits.label_names["5"] == [5, 11, 13]
    selected = select_subset(splits, split="cars 1", labels=["5"])
    assert selected.part.labels.tolist() == [13]
    grey = digits(num_splits=5)[1].train.inputs
    assert torch.equal(splits[1].train.inputs, grey.expand(-1, 3, -1, -1))


def test_shared_options_are_passed_on_and_paths_start_from_the_root(sets):
    seen = []

    def recorded(*, root="", held_out="test", seed=0):
        seen.append((root, held_out, seed))
        return birds(held_out=held_out)

    sets(recorded=recorded, cars=cars)
    entries = [
        {"name": "recorded", "root": "a", "title": "x"},
        {"name": "recorded", "root": "/b", "seed": 4, "title": "y"},
    ]
    validation = recognition(sets=[*entries, "recorded"], root="all", held_out="validation", seed=9)
    assert seen == [("all/a", "validation", 9), ("/b", "validation", 4), ("", "validation", 9)]
    assert len(validation[0].query) == 3
    recognition(sets=[{"name": "recorded", "options": {"seed": 2}}])
    assert seen[-1] == ("", "test", 2)
    with pytest.raises(UserError, match="sets.0: the data set cars has no validation part"):
        recognition(sets=["cars"], held_out="validation")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"sets must be a list of data sets, such as \[digits, \{name: ...\}\], got \[\]"),
        ("digits", "sets must be a list of data sets"),
        ([3], r"sets.0: a data set must be a name, or \{name: .*, got 3"),
        ([{"title": "x"}], "sets.0: a data set must be a name"),
        ([{"name": "digits", "join": "no"}], "sets.0: a data set must be a name, or .*join: true or false"),
        (["digits", "digist"], "sets.1: unknown data set 'digist': did you mean 'digits'"),
        (
            [{"name": "digits", "num_split": 2}],
            "sets.0: unknown option of digits 'num_split': did you mean 'num_splits'",
        ),
        ([{"name": "digits", "num_splits": 3}], "sets.0: num_splits must divide the ten digits"),
        (
            [{"name": "digits", "held_out": "test"}],
            "sets.0: held_out is the same for all data sets; give it beside sets",
        ),
        (["folders"], "sets.0: the data set folders needs the option 'root'"),
        (["digits", "digits"], r"the names of splits must differ, got \['digits', 'digits'\]"),
    ],
)
def test_entries_that_cannot_be_used_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        recognition(sets=given)


def test_held_out_classes_must_be_trained(sets):
    sets(unseen=lambda: [split_of(torch.tensor([1, 1]), torch.tensor([1, 2]))])
    with pytest.raises(UserError, match="split 'unseen' has held-out images of class 2, but no training image of it"):
        recognition(sets=["unseen"])


def test_names_that_are_not_unique_get_their_label(sets):
    labels = torch.tensor([1, 2, 3])
    sets(twins=lambda: SplitSequence([split_of(labels, labels)], label_names={"a": [1, 2], "b": [3]}))
    assert recognition(sets=["twins"]).provides["class_names"] == [["a 1", "a 2", "b"]]


def test_images_are_scaled_cropped_and_get_three_channels():
    ramp = torch.arange(12.0).reshape(1, 2, 6) / 12  # 2 high, 6 wide: the middle two columns stay
    assert as_rgb(ramp, 2).tolist() == ramp[:, :, 2:4].expand(3, 2, 2).tolist()
    image = torch.rand(3, 8, 8)
    assert torch.equal(as_rgb(image, 8), image)
    halved = as_rgb(torch.ones(5, 1, 4, 4), 2)
    assert halved.shape == (5, 3, 2, 2)
    assert torch.allclose(halved, torch.ones(()))
    for wrong in (torch.rand(2, 4, 4), torch.rand(4, 4), torch.zeros(3, 4, 4).byte()):
        with pytest.raises(UserError, match="images must be floating-point tensors .* with 1 or 3 channels, got "):
            as_rgb(wrong, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_made_when_indexed_equal_those_made_at_once(channels, monkeypatch):
    images = torch.rand(5, channels, 9, 7)
    at_once = rgb_inputs(images, 4)
    assert isinstance(at_once, torch.Tensor)
    monkeypatch.setattr("mas_embed.recognition.images.LARGEST_IN_MEMORY", 5 * channels * 16 * 4 - 1)
    one_by_one = rgb_inputs(images, 4)
    assert isinstance(one_by_one, RGBImages) and len(one_by_one) == 5
    torch.testing.assert_close(torch.stack([one_by_one[index] for index in range(5)]), at_once)


def test_image_files_are_read_when_indexed_and_known_by_their_names(tmp_path, sets):
    for index in range(4):
        pixels = np.full((6, 10, 3), 60 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    files = ImageFiles([tmp_path / f"{index}.png" for index in range(4)], size=6)

    def photographs():
        part = Part(files, torch.tensor([0, 0, 1, 1]))
        return [Split("photographs", part, part, part)]

    sets(photographs=photographs)
    (split,) = recognition(sets=["photographs"], image_size=3)
    assert split.train[3][0].shape == (3, 3, 3)
    assert split.train[3][0].unique().item() == pytest.approx(180 / 255)
    before = fingerprint_of_split(split)
    Image.fromarray(np.zeros((60, 70, 3), dtype=np.uint8)).save(tmp_path / "3.png")
    assert fingerprint_of_split(recognition(sets=["photographs"], image_size=3)[0]) != before


def test_augmented_images_stay_those_that_are_trained_on(sets):
    images = torch.rand(4, 1, 8, 8)
    train, held_out = Part(images, torch.arange(4) % 2, augmented=1 - images), Part(images, torch.arange(4) % 2)
    sets(augmented=lambda: [Split("one", train, held_out, held_out)])
    (split,) = recognition(sets=["augmented"], image_size=8)
    assert torch.allclose(split.train.augmented, (1 - images).expand(-1, 3, -1, -1))
    assert torch.allclose(split.train.inputs, images.expand(-1, 3, -1, -1)) and split.query.augmented is None
