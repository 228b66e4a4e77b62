import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from mas_embed import UserError
from mas_embed.data import DATASETS, fingerprint_of_split, join_splits, ordered_batches, select_subset, text_manifest

ROWS = [
    {"text": f"{label} number {index}, please", "label": label, "split": split, "part": part}
    for split, labels in (("home", ("lights", "music")), ("bank", ("pay", "music")))
    for label in labels
    for index, part in enumerate(("train", "train", "validation", "validation", "test", "test", "train"))
]


def write(path, rows):
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def texts(rows, split, part):
    return [row["text"] for row in rows if row["split"] == split and row["part"] == part]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet"])
def test_every_line_is_in_its_split_and_part(tmp_path, name):
    splits = text_manifest(path=write(tmp_path / name, ROWS))
    assert [split.name for split in splits] == ["home", "bank"]
    for split in splits:
        assert split.train.inputs == texts(ROWS, split.name, "train")
        assert split.query.inputs == texts(ROWS, split.name, "test")
        assert split.query is split.gallery
    assert splits.label_names == {"lights": [0], "music": [1], "pay": [2]}  # music is one class in both splits
    assert splits[0].train.labels.tolist() == [0] * 3 + [1] * 3 and splits[1].query.labels.tolist() == [2, 2, 1, 1]
    ids = torch.cat([part.ids for split in splits for part in (split.train, split.query)])
    assert len(ids.unique()) == len(ids)


def test_the_validation_texts_are_those_of_that_part(tmp_path):
    path = write(tmp_path / "list.csv", ROWS)
    split = text_manifest(path=path, held_out="validation")[1]
    assert split.query.inputs == texts(ROWS, "bank", "validation")
    assert split.train.inputs == texts(ROWS, "bank", "train")


def test_the_order_of_splits_and_a_choice_of_them(tmp_path):
    path = write(tmp_path / "list.csv", ROWS)
    assert [split.name for split in text_manifest(path=path, splits=["bank", "home"])] == ["bank", "home"]
    (split,) = text_manifest(path=path, splits=["bank"])
    assert split.train.labels.unique().tolist() == [0, 1]
    with pytest.raises(UserError, match="unknown split of .*list.csv 'hom': did you mean 'home'"):
        text_manifest(path=path, splits=["hom"])
    with pytest.raises(UserError, match="at least one split"):
        text_manifest(path=path, splits=[])


def test_texts_without_a_part_are_divided_at_random(tmp_path):
    rows = [{"text": f"{label} {index}", "label": label} for label in "ab" for index in range(20)]
    path = write(tmp_path / "list.csv", rows)
    (split,) = text_manifest(path=path, seed=1)
    (validation,) = text_manifest(path=path, seed=1, held_out="validation")
    assert split.name == "all" and [len(part) for part in (split.train, split.query)] == [24, 10]
    assert split.train.inputs == validation.train.inputs
    parts = [*split.train.inputs, *split.query.inputs, *validation.query.inputs]
    assert sorted(parts) == sorted(row["text"] for row in rows)
    assert split.train.inputs != text_manifest(path=path, seed=2)[0].train.inputs


def test_an_id_identifies_a_text_in_several_splits(tmp_path):
    rows = [row | {"id": f"{row['text']} {row['part']}"} for row in ROWS]  # the music texts are the same in both splits
    first, second = text_manifest(path=write(tmp_path / "list.csv", rows))
    shared = set(first.query.ids.tolist()) & set(second.query.ids.tolist())
    assert len(shared) == 2
    by_id = dict(zip(first.query.ids.tolist(), first.query.inputs, strict=True))
    for number, text in zip(second.query.ids.tolist(), second.query.inputs, strict=True):
        assert number not in shared or by_id[number] == text


@pytest.mark.parametrize(
    ("change", "row", "match"),
    [
        ({"text": " "}, 1, r"line 3 of .*list.csv has an empty text"),
        ({"label": ""}, 0, r"line 2 of .* has an empty label"),
        ({"split": ""}, 4, r"line 6 of .* has an empty split"),
        ({"part": "dev"}, 0, r"line 2 of .* has the part 'dev'; it must be train, validation or test"),
        ({"part": ""}, 2, r"line 4 of .* has an empty part"),
        ({"text": "x" * 100_001}, 3, r"line 5 of .* has 100,001 characters in the column 'text'"),
        ({"id": "0"}, 5, r"line 7 of .* has the id '0' of line 2 of .*; an id may be repeated only in another split"),
        ({"id": "0"}, -3, r"line 27 of .* has the id '0' of line 2 of .* in the same part"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, change, row, match):
    rows = [one | {"id": str(index)} for index, one in enumerate(ROWS)]
    rows[row] |= change
    with pytest.raises(UserError, match=match):
        text_manifest(path=write(tmp_path / "list.csv", rows))


def test_an_id_without_a_part_is_not_repeated(tmp_path):
    rows = [{"text": "a", "label": "x", "split": split, "id": "7"} for split in "st"]
    with pytest.raises(UserError, match="line 2 .* has the id '7' of line 1"):
        text_manifest(path=write(tmp_path / "list.jsonl", rows))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        text_manifest(path=tmp_path / "none.csv")
    with pytest.raises(UserError, match="line 1 of .* lacks label; it needs text, label"):
        text_manifest(path=write(tmp_path / "a.csv", [{"text": "a"}]))
    with pytest.raises(UserError, match="lacks label"):
        text_manifest(path=write(tmp_path / "a.parquet", [{"text": "a"}]))
    with pytest.raises(UserError, match="row 2 of .* must have plain values"):
        rows = [{"text": "a", "label": "b", "x": None}, {"text": "a", "label": "b", "x": [1]}]
        text_manifest(path=write(tmp_path / "b.parquet", rows))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="c.parquet is not a readable Parquet file"):
        text_manifest(path=tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"must be a JSON object of plain values such as \{'text': ..., 'label': ...\}"):
        text_manifest(path=write(tmp_path / "d.jsonl", [[1]]))
    (tmp_path / "e.csv").write_text("text,label\n")
    with pytest.raises(UserError, match="e.csv has no text"):
        text_manifest(path=tmp_path / "e.csv")
    only_train = [row | {"part": "train"} for row in ROWS]
    with pytest.raises(UserError, match="has no text of the part 'test' in the split 'home'"):
        text_manifest(path=write(tmp_path / "f.csv", only_train))
    with pytest.raises(UserError, match="held_out must be"):
        text_manifest(path=tmp_path / "f.csv", held_out="train")


def test_a_missing_pyarrow_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "list.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install 'mas-embed\[parquet\]'"):
        text_manifest(path=path)


def test_batches_hold_lists_of_str(tmp_path):
    """Joined, selected and single parts give the texts that they were made of, in batches of any size."""
    splits = DATASETS["text_manifest"](path=write(tmp_path / "list.csv", ROWS))
    joined, subset = join_splits(splits).train, select_subset(splits, labels=["music"]).part
    expected = [*splits[0].train.inputs, *splits[1].train.inputs]
    for part, texts_of_part in ((joined, expected), (subset, [text for text in expected if text.startswith("music")])):
        batches = list(ordered_batches(part, batch_size=5))
        assert [text for inputs, _ in batches for text in inputs] == texts_of_part
        assert torch.equal(torch.cat([labels for _, labels in batches]), part.labels)
    assert [list(batch) for batch in ordered_batches(splits[0].train.inputs, batch_size=4)] == [
        splits[0].train.inputs[:4],
        splits[0].train.inputs[4:],
    ]
    inputs, labels = next(iter(DataLoader(splits[0].train, batch_size=3)))
    assert list(inputs) == splits[0].train.inputs[:3] and labels.dtype == torch.long


def test_a_changed_text_changes_the_fingerprint(tmp_path):
    first = text_manifest(path=write(tmp_path / "list.csv", ROWS))[0]
    again = text_manifest(path=write(tmp_path / "list.jsonl", ROWS))[0]
    changed = text_manifest(path=write(tmp_path / "list.csv", [ROWS[0] | {"text": "another"}, *ROWS[1:]]))[0]
    assert fingerprint_of_split(first) == fingerprint_of_split(again) != fingerprint_of_split(changed)
