"""The readers of published layouts, each on a small copy of its layout."""

import hashlib
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data.photographs import red, write_birds, write_flowers, write_photograph
from scipy.io import savemat

from mas_embed import DATASETS, UserError
from mas_embed.data import cars196, cub200, flowers102, grocery, in_shop, stanford_online_products, torchvision_images
from mas_embed.evaluation.retrieval import check_queries_are_answerable
from mas_embed.testing import check_dataset

SMALL = {"image_size": 8, "short_side": 8}


def summary(splits):
    """By split the names of the classes that are trained on, queried and in the gallery, and the numbers of images."""
    check_queries_are_answerable(splits)
    names = {label: name for name, (label,) in splits.label_names.items()}

    def described(part):
        return sorted({names[label] for label in part.labels.tolist()}), len(part)

    return {split.name: tuple(map(described, (split.train, split.query))) for split in splits}


def all_reds(part):
    return sorted(red(image) for image in part.inputs)


# CUB-200-2011: four classes of five images; the first three are training images; the red of an image is its number


@pytest.fixture
def birds(tmp_path):
    return write_birds(tmp_path)


def bird(*labels):
    return [f"00{label}.Bird {label}" for label in labels]


def test_birds_that_are_never_trained_on(birds):
    splits = cub200(root=birds, splits=2, **SMALL)
    assert summary(splits) == {"1": ((bird(1), 5), (bird(3), 5)), "2": ((bird(2), 5), (bird(4), 5))}
    assert all(abs(value - number) <= 3 for value, number in zip(all_reds(splits[1].train), range(6, 11), strict=True))
    (joint,) = cub200(root=birds / "CUB_200_2011", splits=1, **SMALL)
    assert (len(joint.train), len(joint.query)) == (10, 10)
    (validation,) = cub200(root=birds, splits=1, held_out="validation", **SMALL)
    used = {*validation.train.labels.tolist(), *validation.query.labels.tolist()}
    assert (len(validation.train), len(validation.query), len(used)) == (5, 5, 2)
    assert max(all_reds(validation.query)) < 13  # of the first half


def test_birds_that_are_trained_on(birds):
    splits = cub200(root=birds, splits=2, held_out_classes="seen", **SMALL)
    assert summary(splits) == {
        "1": ((bird(1, 2), 6), (bird(1, 2), 4)),
        "2": ((bird(3, 4), 6), (bird(3, 4), 4)),
    }
    named = cub200(root=birds, splits={"late": bird(4, 1)}, held_out_classes="seen", **SMALL)
    assert summary(named) == {"late": ((bird(1, 4), 6), (bird(1, 4), 4))}


def test_birds_of_both_kinds(birds):
    splits = cub200(root=birds, splits=2, held_out_classes="both", **SMALL)
    assert summary(splits) == {"1": ((bird(1), 3), (bird(1, 3), 7)), "2": ((bird(2), 3), (bird(2, 4), 7))}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "images.txt",
            "Bird_2.jpg\n4",
            "gone.jpg\n4",
            "line 3 of .*images.txt lists '001.Bird 1/gone.jpg', but there is no such",
        ),
        (
            "images.txt",
            "\n20 004.Bird 4/Bird_4.jpg",
            "",
            "line 20 of .*image_class_labels.txt has the id '20', which the list",
        ),
        ("images.txt", "\n20 004", "\n20", r"line 20 of .*images.txt lists '4/Bird"),
        ("image_class_labels.txt", "20 4", "20 5", "line 20 of .*image_class_labels.txt has the id '5'"),
        ("image_class_labels.txt", "20 4", "20", "line 20 of .* must have 2 columns, got '20'"),
        ("train_test_split.txt", "\n20 0", "", "train_test_split.txt lists 19 images, but images.txt lists 20"),
    ],
)
def test_lists_that_contradict_each_other_are_named(birds, file, old, new, message):
    path = birds / "CUB_200_2011" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        cub200(root=birds, **SMALL)


def test_options_of_a_benchmark(birds):
    with pytest.raises(
        UserError, match="there is no images.txt in nowhere; data.root must be the folder that holds it"
    ):
        cub200(root="nowhere")
    with pytest.raises(UserError, match="has 2 classes, too few for 5 splits"):
        cub200(root=birds, **SMALL)
    with pytest.raises(UserError, match="held_out_classes must be"):
        cub200(root=birds, held_out_classes="new", **SMALL)
    with pytest.raises(UserError, match="splits must be a number, lists of classes, or 'groups', got 'all'"):
        cub200(root=birds, splits="all", **SMALL)
    (birds / "CUB_200_2011" / "images" / "001.Bird 1" / "Bird_0.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the image .*Bird_0.jpg"):
        cub200(root=birds, splits=2, **SMALL)


# Cars196, in both layouts


def records(rows, names):
    kinds = [(name, "O") for name in names]
    return np.array([tuple(row) for row in rows], dtype=kinds)


CARS = [(1 + index % 4, index % 3 == 0) for index in range(24)]  # class and whether it is a test image


@pytest.fixture
def cars(tmp_path):
    rows = []
    for number, (label, is_test) in enumerate(CARS):
        link = f"car_ims/{number + 1:06}.jpg"
        write_photograph(tmp_path / link, 10 * label)
        rows.append((link, 1, 1, 2, 2, float(label), float(is_test)))
    names = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    savemat(tmp_path / "cars_annos.mat", {"annotations": records(rows, names), "class_names": make_names()})
    return tmp_path


def make_names():
    return np.array([f"Car {label}" for label in range(1, 5)], dtype=object)


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    rows = {"train": [], "test": []}
    for label, is_test in CARS:
        part = "test" if is_test else "train"
        name = f"{len(rows[part]) + 1:05}.jpg"
        write_photograph(root / f"cars_{part}" / name, 10 * label)
        rows[part].append((1, 1, 2, 2, label, name))
    names = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": make_names()})
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": records(rows["train"], names)})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": records(rows["test"], names)})
    return tmp_path


@pytest.mark.parametrize("layout", ["cars", "devkit"])
def test_cars(layout, request):
    root = request.getfixturevalue(layout)
    unseen = cars196(root=root, splits=2, **SMALL)
    assert summary(unseen) == {"1": ((["Car 1"], 6), (["Car 3"], 6)), "2": ((["Car 2"], 6), (["Car 4"], 6))}
    assert all(abs(value - 10) <= 3 for value in all_reds(unseen[0].train))
    seen = cars196(root=root, splits=1, held_out_classes="seen", **SMALL)
    assert summary(seen)["1"] == (
        ([f"Car {label}" for label in range(1, 5)], 16),
        ([f"Car {label}" for label in range(1, 5)], 8),
    )


def test_cars_that_are_not_as_published(cars):
    (cars / "car_ims" / "000003.jpg").unlink()
    with pytest.raises(
        UserError, match="entry 3 of .*cars_annos.mat lists 'car_ims/000003.jpg', but there is no such file"
    ):
        cars196(root=cars)
    savemat(cars / "cars_annos.mat", {"annotations": records([(1,)], ["fname"]), "class_names": make_names()})
    with pytest.raises(UserError, match="annotations of .*cars_annos.mat lack the field 'relative_im_path'"):
        cars196(root=cars)
    savemat(cars / "cars_annos.mat", {"annotations": 1})
    with pytest.raises(UserError, match="cars_annos.mat lacks the variable 'class_names'"):
        cars196(root=cars)
    (cars / "cars_annos.mat").write_bytes(b"torn")
    with pytest.raises(UserError, match="cars_annos.mat is not a readable MATLAB file"):
        cars196(root=cars)


# Flowers-102


@pytest.fixture
def flowers(tmp_path):
    return write_flowers(tmp_path)


def test_flowers(flowers):
    splits = flowers102(root=flowers, splits=2, **SMALL)
    assert summary(splits) == {"1": ((["1", "2"], 4), (["1", "2"], 4)), "2": ((["3", "4"], 4), (["3", "4"], 4))}
    (validation,) = flowers102(root=flowers, splits=1, held_out="validation", **SMALL)
    assert [round(value / 9) for value in all_reds(validation.query)] == [3, 4, 9, 10, 15, 16, 21, 22]
    unseen = flowers102(root=flowers, splits=2, held_out_classes="unseen", **SMALL)
    assert summary(unseen) == {"1": ((["1"], 6), (["3"], 6)), "2": ((["2"], 6), (["4"], 6))}


def test_flowers_that_are_not_as_published(flowers):
    root = flowers / "flowers-102"
    (root / "jpg" / "image_00007.jpg").unlink()
    with pytest.raises(UserError, match="entry 7 of .*setid.mat lists 'image_00007.jpg', but there is no such file"):
        flowers102(root=flowers, splits=2)
    savemat(root / "setid.mat", {"trnid": [1, 2], "valid": [2], "tstid": [3]})
    with pytest.raises(UserError, match="setid.mat lists image 2 twice"):
        flowers102(root=flowers)
    savemat(root / "setid.mat", {"trnid": [1, 99], "valid": [2], "tstid": [3]})
    with pytest.raises(UserError, match="setid.mat lists image 99 but there are 24 labels"):
        flowers102(root=flowers)


# Stanford Online Products


@pytest.fixture
def products(tmp_path):
    root = tmp_path / "Stanford_Online_Products"
    number = 0
    for part, first in (("train", 1), ("test", 5)):
        lines = ["image_id class_id super_class_id path"]
        for label in range(first, first + 4):
            kind = ("bicycle", "chair")[label % 2]
            for index in range(3):
                number += 1
                link = f"{kind}_final/{label}_{index}.JPG"
                write_photograph(root / link, 10 * label)
                lines.append(f"{number} {label} {1 + label % 2} {link}")
        (root / f"Ebay_{part}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_products(products):
    splits = stanford_online_products(root=products, **SMALL)
    assert summary(splits) == {
        "chair": ((["1", "3"], 6), (["5", "7"], 6)),
        "bicycle": ((["2", "4"], 6), (["6", "8"], 6)),
    }
    dealt = stanford_online_products(root=products, splits=2, **SMALL)
    assert summary(dealt) == {"1": ((["1", "2"], 6), (["5", "6"], 6)), "2": ((["3", "4"], 6), (["7", "8"], 6))}
    (validation,) = stanford_online_products(root=products, splits=1, held_out="validation", **SMALL)
    assert (len(validation.train), len(validation.query)) == (9, 3)
    assert not {*validation.train.labels.tolist()} & {*validation.query.labels.tolist()}


def test_products_that_are_not_as_published(products):
    root = products / "Stanford_Online_Products"
    path = root / "Ebay_test.txt"
    path.write_text(path.read_text().replace("13 5 ", "13 1 "))
    with pytest.raises(UserError, match="the class 1 of .* is listed both for training and for testing"):
        stanford_online_products(root=products)
    (root / "chair_final" / "1_1.JPG").unlink()
    with pytest.raises(
        UserError, match="line 3 of .*Ebay_train.txt lists 'chair_final/1_1.JPG', but there is no such file"
    ):
        stanford_online_products(root=products)
    write_photograph(root / "chair_final" / "1_1.JPG")
    path.unlink()
    with pytest.raises(UserError, match="cannot read the list .*Ebay_test.txt"):
        stanford_online_products(root=products)


# In-shop


@pytest.fixture
def clothes(tmp_path):
    lines = ["28", "image_name item_id evaluation_status"]
    for item in range(1, 8):
        parts = ("train",) * 4 if item <= 4 else ("query", "gallery", "gallery", "query")
        for index, part in enumerate(parts):
            link = f"img/{'WOMEN/Dresses' if item % 2 else 'MEN/Denim'}/id_0000000{item}/0{index}_1_front.jpg"
            write_photograph(tmp_path / "Img" / link, 10 * item + index)
            lines.append(f"{link}   id_0000000{item} {part}")
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))
    return tmp_path


def item(*numbers):
    return [f"id_0000000{number}" for number in numbers]


def test_clothes(clothes):
    splits = in_shop(root=clothes, **SMALL)
    assert summary(splits) == {
        "WOMEN/Dresses": ((item(1, 3), 8), (item(5, 7), 4)),
        "MEN/Denim": ((item(2, 4), 8), (item(6), 2)),
    }
    for split in splits:
        assert len(split.gallery) == len(split.query)
        assert not {*split.query.ids.tolist()} & {*split.gallery.ids.tolist()}
    (validation,) = in_shop(root=clothes, splits=1, held_out="validation", **SMALL)
    assert (len(validation.train), len(validation.query)) == (12, 4)
    assert validation.query is validation.gallery


def test_clothes_that_are_not_as_published(clothes):
    path = clothes / "Eval" / "list_eval_partition.txt"
    text = path.read_text()
    path.write_text(text.replace("28\n", "52712\n"))
    with pytest.raises(UserError, match="line 1 of .* promises '52712' images, but 28 are listed"):
        in_shop(root=clothes)
    path.write_text(text.replace("id_00000001 train", "id_00000001 trian", 1))
    with pytest.raises(UserError, match="line 3 of .* has the part 'trian'; it must be train, query or gallery"):
        in_shop(root=clothes)


# Grocery Store


@pytest.fixture
def groceries(tmp_path):
    rows = ["Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str),x"]
    lists = {"train": [], "val": [], "test": []}
    kinds = [("Fruit/Apple", "Gala"), ("Fruit/Apple", "Elstar"), ("Packages/Milk", "Arla"), ("Packages/Oat", "Oatly"), ("Vegetables/Leek", "Leek"), ("Vegetables/Corn", "Corn")]  # fmt: skip
    coarse = {"Apple": 0, "Milk": 1, "Oat": 2, "Leek": 3, "Corn": 4}
    for number, (folder, name) in enumerate(kinds):
        kind = folder.split("/")[1]
        rows.append(f"{name},{number},{kind},{coarse[kind]},/iconic/{name}.jpg,/iconic/{name}.txt")
        for part, count in (("train", 3), ("val", 1 if name == "Leek" else 2), ("test", 2)):
            for index in range(count):
                link = f"{part}/{folder}/{name}/{name}_{index}.jpg"
                write_photograph(tmp_path / link, 10 * number)
                lists[part].append(f"{link}, {number}, {coarse[kind]}")
    (tmp_path / "classes.csv").write_text("\n".join(rows))
    for part, lines in lists.items():
        (tmp_path / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_groceries(groceries):
    splits = grocery(root=groceries, image_size=8)
    assert summary(splits) == {
        "Fruit": ((["Elstar", "Gala"], 6), (["Elstar", "Gala"], 4)),
        "Vegetables": ((["Corn", "Leek"], 6), (["Corn", "Leek"], 4)),
        "Packages": ((["Arla", "Oatly"], 6), (["Arla", "Oatly"], 4)),
    }
    coarse = grocery(root=groceries, labels="coarse", image_size=8)
    assert summary(coarse)["Fruit"] == ((["Apple"], 6), (["Apple"], 4))
    unseen = grocery(root=groceries, held_out_classes="unseen", splits=1, image_size=8)
    assert len(summary(unseen)["1"][0][0]) == len(summary(unseen)["1"][1][0]) == 3


def test_the_only_held_out_image_of_a_class_is_no_query(groceries):
    with pytest.warns(
        UserWarning, match="1 held-out images of .* are the only ones of their class, so they are in the gallery"
    ):
        splits = grocery(root=groceries, held_out="validation", image_size=8)
    assert [(len(split.query), len(split.gallery)) for split in splits] == [(4, 4), (2, 3), (4, 4)]
    check_queries_are_answerable(splits)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.txt", ", 0, 0", ", 9, 0", "line 1 of .*train.txt has the id '9', which the list of them lacks"),
        (
            "train.txt",
            ", 0, 0",
            ", 0, 3",
            "line 1 of .*train.txt gives the product 0 the kind 3, but classes.csv gives it 0",
        ),
        ("test.txt", "Gala_0.jpg", "Gala_9.jpg", "line 1 of .*test.txt lists .*Gala_9.jpg', but there is no such file"),
        ("val.txt", ", 0, 0", "", "line 1 of .*val.txt must have 3 columns"),
        ("classes.csv", "Gala,0,Apple,0", "Gala", "line 2 of .*classes.csv must have at least 4 columns"),
    ],
)
def test_groceries_that_are_not_as_published(groceries, file, old, new, message):
    path = groceries / file
    path.write_text(path.read_text().replace(old, new, 1).replace(",/iconic/Gala.jpg,/iconic/Gala.txt", ""))
    with pytest.raises(UserError, match=message):
        grocery(root=groceries, image_size=8)


def test_the_real_groceries(tmp_path):
    archive = Path(os.environ.get("MAS_EMBED_DATA", "../shared/data")) / "grocery_s96.zip"
    if not archive.exists():
        pytest.skip("the Grocery Store photographs are not at hand; MAS_EMBED_DATA is the folder that holds them")
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    splits = grocery(root=tmp_path, image_size=32, unreadable="unchecked")
    assert [(split.name, len(split.train), len(split.query)) for split in splits] == [
        ("Fruit", 1142, 1117),
        ("Vegetables", 634, 587),
        ("Packages", 864, 781),
    ]
    assert len(splits.label_names) == 81
    check_queries_are_answerable(splits)


# CIFAR-100, which torchvision reads


def test_cifar100(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    contents = {"meta": {"fine_label_names": [f"class {label}" for label in range(100)]}}
    for name, count in (("train", 500), ("test", 200)):
        labels = np.arange(count) % 100
        pixels = np.repeat(labels.astype(np.uint8)[:, None], 3072, axis=1)
        contents[name] = {"data": pixels, "fine_labels": labels.tolist()}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))

    def entry(name):
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    monkeypatch.setattr(CIFAR100, "train_list", [entry("train")])
    monkeypatch.setattr(CIFAR100, "test_list", [entry("test")])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": entry("meta")[1]})
    splits = torchvision_images(dataset="CIFAR100", root=tmp_path, num_splits=10)
    assert [split.name for split in splits][:2] == ["0-9", "10-19"]
    for split in splits:
        assert (len(split.train), len(split.query)) == (40, 20)
        assert torch.equal((split.train.inputs[:, 0, 0, 0] * 255).round().long(), split.train.labels)


@pytest.mark.parametrize(
    ("reader", "files", "options"),
    [
        (cub200, "birds", {"splits": 1}),
        (cars196, "cars", {"splits": 1}),
        (flowers102, "flowers", {"splits": 2}),
        (stanford_online_products, "products", {"splits": 1}),
        (in_shop, "clothes", {}),
        (grocery, "groceries", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*are the only ones of their class")
def test_the_contract(reader, files, options, request):
    root = request.getfixturevalue(files)
    check_dataset(partial(reader, root=root, image_size=8, **options), has_duplicates=True)


def test_benchmarks_have_names_in_a_config():
    assert {"cub200", "cars196", "flowers102", "grocery", "in_shop", "stanford_online_products"} <= set(DATASETS)
