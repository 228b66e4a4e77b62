import json

import pytest
import torch
from data.photographs import red, write_photograph
from data.test_text_manifest import write

from mas_embed import UserError
from mas_embed.data import DATASETS, image_manifest

PARTS = ("train", "train", "train", "validation", "validation", "test", "test")


@pytest.fixture
def rows(tmp_path):
    """Two splits of two classes of seven images; "pear" is in both. The red of an image is its number."""
    rows = []
    for split, labels in (("shop", ("fig", "pear")), ("market", ("kiwi", "pear"))):
        for label in labels:
            for index, part in enumerate(PARTS):
                name = f"pictures/{split} {label}/Bild ü {index}.png"
                write_photograph(tmp_path / name, len(rows))
                date = f"20{24 + (split == 'market')}-0{index + 1}-03"
                rows.append({"path": name, "label": label, "split": split, "part": part, "date": date})
    return rows


def without(rows, *columns):
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def values(part):
    return [red(image) for image in part.inputs]


def listed(rows, split, part):
    return [number for number, row in enumerate(rows) if (row["split"], row["part"]) == (split, part)]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet"])
def test_every_line_is_in_its_split_and_part(tmp_path, rows, name):
    path = write(tmp_path / name, rows)
    for held_out in ("test", "validation"):
        splits = image_manifest(path=path, image_size=8, held_out=held_out)
        assert [split.name for split in splits] == ["shop", "market"]
        for split in splits:
            assert values(split.train) == listed(rows, split.name, "train")
            assert values(split.query) == listed(rows, split.name, held_out)
            assert split.query is split.gallery
    assert splits.label_names == {"fig": [0], "pear": [1], "kiwi": [2]}
    assert splits[1].train.labels.tolist() == [2] * 3 + [1] * 3
    assert DATASETS["manifest"] is image_manifest


def test_splits_are_chosen_by_name_or_number(tmp_path, rows):
    path = write(tmp_path / "list.csv", rows)
    assert [split.name for split in image_manifest(path=path, image_size=8, splits=["market"])] == ["market"]
    assert [split.name for split in image_manifest(path=path, image_size=8, splits=1)] == ["shop"]
    with pytest.raises(UserError, match="unknown split of .* 'markt': did you mean 'market'"):
        image_manifest(path=path, splits=["markt"])
    with pytest.raises(UserError, match="has 2 splits, too few for splits=3"):
        image_manifest(path=path, splits=3)


def test_images_are_elsewhere_than_their_list(tmp_path, rows):
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists" / "list.csv", rows)
    assert len(image_manifest(path=path, root=tmp_path, image_size=8)) == 2
    with pytest.raises(UserError, match=r"line 2 of .*list.csv lists 'pictures/.*', but there is no such file in"):
        image_manifest(path=path)


def test_without_splits_classes_are_dealt_or_stay_together(tmp_path, rows):
    path = write(tmp_path / "list.csv", without(rows, "split", "date"))
    (split,) = image_manifest(path=path, image_size=8)
    assert split.name == "all" and len(split.train) == 12
    dealt = image_manifest(path=path, image_size=8, splits=3)
    assert [split.name for split in dealt] == ["1", "2", "3"]
    assert [values(split.query) for split in dealt] == [[5, 6], [12, 13, 26, 27], [19, 20]]
    assert list(dealt.label_names) == ["fig", "pear", "kiwi"]


@pytest.mark.parametrize(
    ("periods", "names"),
    [
        ("year", ["2024", "2025"]),
        ("quarter", ["2024-Q1", "2024-Q2", "2024-Q3", "2025-Q1", "2025-Q2", "2025-Q3"]),
        ("month", [f"{year}-0{month}" for year in (2024, 2025) for month in range(1, 8)]),
        ("day", [f"{year}-0{month}-03" for year in (2024, 2025) for month in range(1, 8)]),
    ],
)
def test_dates_make_splits(tmp_path, rows, periods, names):
    rows = without(rows, "split", "part")
    for row in rows[::2]:
        row["date"] += "T23:59:00"
    copies = [
        {**row, "path": f"pictures/copy {index} {number}.png"} for number, row in enumerate(rows) for index in range(6)
    ]
    for row in copies:
        write_photograph(tmp_path / row["path"], 100)
    path = write(tmp_path / "list.csv", [*reversed(copies), *reversed(rows)])
    assert [split.name for split in image_manifest(path=path, image_size=8, periods=periods)] == names


def test_weeks_belong_to_the_year_that_has_most_of_them(tmp_path, rows):
    rows = [{**row, "date": "2024-12-30" if row["split"] == "shop" else "2025-01-02"} for row in rows]
    path = write(tmp_path / "list.csv", without(rows, "split"))
    assert [split.name for split in image_manifest(path=path, image_size=8, periods="week")] == ["2025-W01"]


def test_without_parts_images_are_drawn(tmp_path, rows):
    path = write(tmp_path / "list.csv", without(rows, "part"))
    test, validation = (image_manifest(path=path, image_size=8, held_out=part) for part in ("test", "validation"))
    for one, other in zip(test, validation, strict=True):
        assert (len(one.train), len(one.query), len(other.query)) == (6, 4, 4)
        assert not {*values(one.train)} & {*values(one.query)} and not {*values(one.query)} & {*values(other.query)}


def test_a_validation_part_is_drawn_of_the_training_images_if_none_is_listed(tmp_path, rows):
    rows = [{**row, "part": "train" if row["part"] == "validation" else row["part"]} for row in rows]
    path = write(tmp_path / "list.csv", rows)
    test, validation = (image_manifest(path=path, image_size=8, held_out=part) for part in ("test", "validation"))
    assert (len(test[0].train), len(test[0].query)) == (10, 4)
    assert (len(validation[0].train), len(validation[0].query)) == (6, 4)
    assert not {*values(validation[0].query)} & {*values(test[0].query)}


def test_classes_without_training_images_are_unseen(tmp_path, rows):
    rows = [{**row, "part": "test" if row["label"] == "kiwi" else row["part"]} for row in rows]
    path = write(tmp_path / "list.csv", rows)
    both, seen, unseen = (
        image_manifest(path=path, image_size=8, splits=["market"], held_out_classes=classes)[0]
        for classes in ("both", "seen", "unseen")
    )
    assert len(both.query) == 7 + 2
    assert set(seen.query.labels.tolist()) == set(both.train.labels.tolist())
    assert len(unseen.query) == 7
    with pytest.raises(UserError, match="has parts, which say what is trained on; leave out unseen_share"):
        image_manifest(path=path, unseen_share=0.2)


def test_an_image_in_two_splits_has_one_id(tmp_path, rows):
    again = {**rows[5], "split": "market"}
    with pytest.raises(
        UserError, match=r"line 30 of .* lists the file of line 7 of .* again; remove one, or give both"
    ):
        image_manifest(path=write(tmp_path / "list.csv", [*rows, again]), image_size=8)
    with_ids = [{**row, "id": str(number)} for number, row in enumerate(rows)]
    splits = image_manifest(path=write(tmp_path / "list.csv", [*with_ids, {**again, "id": "5"}]), image_size=8)
    assert len(set(splits[0].query.ids.tolist()) & set(splits[1].query.ids.tolist())) == 1
    with pytest.raises(UserError, match="an id may be repeated only in another split"):
        image_manifest(path=write(tmp_path / "list.csv", [*with_ids, {**with_ids[5], "split": "shop"}]), image_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "../secret.png"}, r"row 4 of .* lists '../secret.png', which lies outside"),
        ({"path": "gone.png"}, "row 4 of .* lists 'gone.png', but there is no such file"),
        ({"path": ""}, "row 4 of .* has an empty path"),
        ({"label": ""}, "row 4 of .* has an empty label"),
        ({"part": "query"}, "row 4 of .* has the part 'query'; it must be train, validation or test"),
        ({"split": ""}, "row 4 of .* has an empty split"),
    ],
)
def test_lines_that_are_not_accepted_are_named(tmp_path, rows, change, message):
    rows[3] |= change
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message.replace("row", "line")):
        image_manifest(path=path, image_size=8)
    with pytest.raises(UserError, match=message):
        image_manifest(path=write(tmp_path / "list.parquet", rows), image_size=8)


def test_dates_that_are_not_accepted_are_named(tmp_path, rows):
    with pytest.raises(UserError, match="has a split, so that periods=month has no use"):
        image_manifest(path=write(tmp_path / "list.csv", rows), periods="month")
    rows = without(rows, "split")
    rows[2]["date"] = "31.05.2026"
    with pytest.raises(UserError, match="line 4 of .* has the date '31.05.2026'; it must be like 2026-05-31"):
        image_manifest(path=write(tmp_path / "list.csv", rows), periods="month")
    with pytest.raises(UserError, match="line 1 of .* lacks date"):
        image_manifest(path=write(tmp_path / "list.csv", without(rows, "date")), periods="month")
    with pytest.raises(UserError, match="periods must be 'day'"):
        image_manifest(path=tmp_path / "list.csv", periods="decade")


def test_an_unreadable_image_is_named_or_skipped(tmp_path, rows):
    (tmp_path / rows[0]["path"]).write_bytes(b"no image")
    path = write(tmp_path / "list.csv", rows)
    with pytest.raises(UserError, match="cannot read the image .*Bild ü 0.png"):
        image_manifest(path=path, image_size=8)
    with pytest.warns(UserWarning, match="1 of 28 images are left out because they are unreadable"):
        splits = image_manifest(path=path, image_size=8, unreadable="skip")
    assert values(splits[0].train) == listed(rows, "shop", "train")[1:]


def test_ids_differ(tmp_path, rows):
    splits = image_manifest(path=write(tmp_path / "list.csv", rows), image_size=8)
    ids = torch.cat([part.ids for split in splits for part in (split.train, split.query)])
    assert len(ids.unique()) == len(ids)
