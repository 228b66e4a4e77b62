import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from mas_embed import Part, Split, join_splits
from mas_embed.data import ImageFiles, fingerprint_of_inputs, fingerprint_of_split

LABELS = torch.tensor([0, 0, 1])
ROWS = torch.arange(6.0).view(3, 2)


def split_of(inputs, labels=LABELS):
    held_out = Part(ROWS, LABELS)
    return Split("a", Part(inputs, labels), held_out, held_out)


def files_in(folder, sizes=(1, 2, 3)):
    folder.mkdir(exist_ok=True)
    for name, size in zip("abc", sizes, strict=True):
        (folder / name).write_bytes(b"x" * size)
    return ImageFiles([folder / name for name in "abc"], size=8)


@pytest.mark.parametrize(
    ("inputs", "changed"),
    [
        (ROWS, ROWS + torch.tensor([0.0, 1e-6])),
        (ROWS, ROWS.double()),
        (ROWS.numpy(), ROWS.numpy() + np.float32(1)),
        (["one", "two", "three"], ["one", "two", "tree"]),
        (["one", "two", "three"], ["one", "twot", "hree"]),
        (["one", "two", "\udce9"], ["one", "two", "e"]),
    ],
    ids=["values", "type", "array", "text", "border between texts", "surrogate"],
)
def test_a_change_is_noticed(inputs, changed):
    assert fingerprint_of_split(split_of(inputs)) == fingerprint_of_split(split_of(inputs)) is not None
    assert fingerprint_of_split(split_of(inputs)) != fingerprint_of_split(split_of(changed))
    assert fingerprint_of_inputs(inputs) != fingerprint_of_inputs(changed)


def test_a_changed_label_is_noticed_and_an_id_does_not_count():
    assert fingerprint_of_split(split_of(ROWS)) != fingerprint_of_split(split_of(ROWS, 1 - LABELS))
    assert fingerprint_of_split(split_of(ROWS)) == fingerprint_of_split(split_of(ROWS.clone()))  # new ids


def test_files_count_by_name_and_size_wherever_they_are(tmp_path):
    here = fingerprint_of_split(split_of(files_in(tmp_path / "here")))
    there = files_in(tmp_path / "there")
    assert fingerprint_of_split(split_of(there)) == here is not None
    files_in(tmp_path / "there", sizes=(1, 2, 4))
    assert fingerprint_of_split(split_of(there)) != here
    (tmp_path / "there" / "c").unlink()
    assert fingerprint_of_split(split_of(there)) is None


def test_selected_and_joined_items():
    texts = ["one", "two", "three"]
    assert fingerprint_of_inputs(Subset(texts, [0, 1])) != fingerprint_of_inputs(Subset(texts, [0, 2]))
    joined = [
        fingerprint_of_split(join_splits([split_of(texts), split_of(other)])) for other in (texts, ["a", "b", "c"])
    ]
    assert joined[0] != joined[1]
