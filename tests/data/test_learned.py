"""Data sets whose learned splits are gone: the others are read as they were, and labels go on."""

import shutil

import pytest
import torch
from data.photographs import write_classes, write_photograph

from mas_embed import (
    LearnedSplits,
    Split,
    UserError,
    digits,
    image_folder,
    image_folders,
    image_manifest,
    missing_split,
)
from mas_embed.data import check_splits, fingerprints_of_parts, num_classes, text_manifest


def is_missing(split):
    return len(split.train) == len(split.query) == len(split.gallery) == 0


def same(one, other):
    """Whether two splits have the same labels in all parts, and the same data."""
    parts = ("train", "query", "gallery")
    return fingerprints_of_parts(one) == fingerprints_of_parts(other) and all(
        torch.equal(getattr(one, part).labels, getattr(other, part).labels) for part in parts
    )


@pytest.mark.parametrize("wanted", [["jan", "feb", "mar"], 3])
def test_folders_of_splits(tmp_path, wanted):
    for month in ("jan", "feb"):
        write_classes(tmp_path / month, {"a": 8, "b": 8})
    learned = LearnedSplits.of(image_folders(root=tmp_path, splits=["jan", "feb"], image_size=8))
    write_classes(tmp_path / "mar", {"a": 8, "c": 8})
    whole = image_folders(root=tmp_path, splits=["jan", "feb", "mar"], image_size=8)
    shutil.rmtree(tmp_path / "jan")
    splits = image_folders(root=tmp_path, splits=wanted, image_size=8, learned=learned)
    assert [split.name for split in splits] == ["jan", "feb", "mar"]
    assert is_missing(splits[0]) and same(splits[1], whole[1]) and same(splits[2], whole[2])
    assert splits.label_names == whole.label_names
    with pytest.raises(UserError, match="asks for 'jan', but"):
        image_folders(root=tmp_path, splits=["jan", "feb"], image_size=8)
    with pytest.raises(UserError, match="unseen_share draws .* so the data of all splits must be there"):
        image_folders(root=tmp_path, splits=wanted, image_size=8, learned=learned, unseen_share=0.3)


def test_a_class_that_comes_back_has_its_old_label(tmp_path):
    write_classes(tmp_path / "jan", {"a": 8, "b": 8})
    learned = LearnedSplits.of(image_folders(root=tmp_path, splits=1, image_size=8, shared_classes=True))
    shutil.rmtree(tmp_path / "jan")
    write_classes(tmp_path / "mar", {"b": 8, "c": 8})
    splits = image_folders(root=tmp_path, splits=2, image_size=8, shared_classes=True, learned=learned)
    assert splits.label_names == {"a": [0], "b": [1], "c": [2]}
    assert splits[1].train.labels.unique().tolist() == [1, 2]


def test_folders_of_classes(tmp_path):
    write_classes(tmp_path, dict.fromkeys("abcdef", 8))
    spec = [["a", "b"], ["c", "d"]]
    learned = LearnedSplits.of(image_folder(root=tmp_path, splits=spec, image_size=8))
    whole = image_folder(root=tmp_path, splits=[*spec, ["e", "f"]], image_size=8)
    shutil.rmtree(tmp_path / "b")
    splits = image_folder(root=tmp_path, splits=[*spec, ["e", "f"]], image_size=8, learned=learned)
    assert is_missing(splits[0]) and same(splits[1], whole[1]) and same(splits[2], whole[2])
    with pytest.raises(UserError, match="the class 'a' is in the splits '1', whose data is missing, and '3'"):
        image_folder(root=tmp_path, splits=[*spec, ["a", "f"]], image_size=8, learned=learned)
    with pytest.raises(UserError, match="splits=3 would deal all classes .* anew; .* list the classes of every split"):
        image_folder(root=tmp_path, splits=3, image_size=8, learned=learned)
    with pytest.raises(UserError, match="unknown class"):
        image_folder(root=tmp_path, splits=[*spec, ["e", "x"]], image_size=8, learned=learned)


def write_list(path, rows):
    path.write_text("\n".join(["path,label,split,part", *(",".join(row) for row in rows)]) + "\n")
    return path


def rows_of(folder, split, labels, count=4):
    rows = []
    for label in labels:
        for number in range(count):
            name = f"{split}/{label}{number}.png"
            write_photograph(folder / name, 10 * number)
            rows.append((name, label, split, "train" if number < 2 else "test"))
    return rows


def test_rows_that_are_gone_and_files_that_are_gone(tmp_path):
    old = rows_of(tmp_path, "jan", "ab") + rows_of(tmp_path, "feb", "cd")
    learned = LearnedSplits.of(image_manifest(path=write_list(tmp_path / "list.csv", old), image_size=8))
    new = rows_of(tmp_path, "mar", "de")
    whole = image_manifest(path=write_list(tmp_path / "whole.csv", old + new), image_size=8)
    only_new = image_manifest(path=write_list(tmp_path / "new.csv", new), image_size=8, learned=learned)
    assert [is_missing(split) for split in only_new] == [True, True, False] and same(only_new[2], whole[2])
    assert only_new.label_names == whole.label_names
    assert num_classes(only_new) == 5  # the new splits' labels reach 4
    (tmp_path / old[0][0]).unlink()  # a training image
    (tmp_path / old[-1][0]).unlink()  # a held-out one
    splits = image_manifest(path=tmp_path / "whole.csv", image_size=8, learned=learned)
    sizes = [[len(part) for part in (split.train, split.query, split.gallery)] for split in splits]
    assert sizes == [[0, 4, 4], [4, 0, 0], [4, 4, 4]]
    assert fingerprints_of_parts(splits[0])["held_out"] == fingerprints_of_parts(whole[0])["held_out"]
    (tmp_path / new[0][0]).unlink()
    with pytest.raises(UserError, match="there is no such file"):
        image_manifest(path=tmp_path / "whole.csv", image_size=8, learned=learned)


def test_texts(tmp_path):
    def lines(split, labels):
        return [f"text {label} {index},{label},{split}" for label in labels for index in range(8)]

    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label,split", *lines("jan", "ab")]))
    learned = LearnedSplits.of(text_manifest(path=path))
    path.write_text("\n".join(["text,label,split", *lines("feb", "bc")]))
    splits = text_manifest(path=path, learned=learned)
    assert is_missing(splits[0]) and splits[1].train.labels.unique().tolist() == [1, 2]
    assert LearnedSplits.of(splits).names == ["jan", "feb"]


def test_labels_of_another_data_set_are_not_gone_on_with(tmp_path):
    write_classes(tmp_path / "jan", {"a": 8, "b": 8})
    learned = LearnedSplits(["old"], {"x": [0, 1], "y": [2]}, 3)
    with pytest.raises(UserError, match="the labels of the learned splits are not numbered 0, 1"):
        image_folders(root=tmp_path, splits=2, image_size=8, learned=learned)


def test_parts_that_are_missing_are_refused_unless_they_may_be():
    splits = [missing_split("old"), *digits()[:1]]
    with pytest.raises(UserError, match="split 'old' has an empty train part"):
        check_splits(splits)
    check_splits(splits, may_be_missing=True)
    assert isinstance(splits[0], Split) and fingerprints_of_parts(splits[0]) == {"train": None, "held_out": None}
