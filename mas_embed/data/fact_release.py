"""Facts in the layout in which the authors released 6DS and LSC."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.data.digits import DATASETS, HeldOut, check_held_out
from mas_embed.data.fact_files import Listed, hold_out, make_sequence, read_lines
from mas_embed.data.facts import FactSequence, FactTable, Words
from mas_embed.data.images import ImageFiles, Normalization, find_inside
from mas_embed.errors import UserError, unknown_name

Weights = tuple[float, ...]


class _Rows(NamedTuple):
    """The lines of one list of images."""

    paths: list[Path]
    fact_ids: list[int]


class _Fact(NamedTuple):
    """What the lines of an image list say of its fact, and where."""

    vectors_link: str
    weights: Weights
    where: str


@DATASETS.register("facts")
def read_fact_release(
    *,
    root: str,
    split_name: str = "4tasks_random",
    image_size: int = 224,
    short_side: int | None = None,
    normalization: Normalization = "imagenet",
    held_out: HeldOut = "test",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> FactSequence:
    """A folder in the layout of 6DS and LSC (Aljundi et al., 2018; Elhoseiny et al., 2018) as a sequence of splits.

    Split k is what `splits/<split_name>/B{k}_{train,test}.csv` list, for as many k as there are. A fact's words are those
    of `B{k}_facts.csv`; its vectors the numbers of the file in `NLP_feat/` that its first line names, and zero in slots
    whose weight is 0. Images are decoded on demand; one that is listed as .jpg may be there as .png, and greyscale becomes
    RGB. Rows of the table of facts are in the order of the facts' ids.

    Args:
        root: the folder that holds `images/`, `NLP_feat/` and `splits/`.
        split_name: a folder in `splits/`.
        image_size: pixels a side of the inputs, float32 [3, image_size, image_size].
        short_side: of an image before its centre is cut out (the release: 256 for 224); None for `image_size`.
        normalization: of colours, "imagenet" or "none" for values in [0, 1].
        held_out: what splits are judged by: "test" (trained on all that the release trains on), or "validation": a fifth
            of the training images of each fact, which are then not trained on; an image of several facts, in whatever
            splits, goes wholly to one side.
        keep_megabytes: how much memory the decoded images of a part may take; 0 to decode every time.
        seed: of the partition into train and validation.

    Raises:
        UserError: names the file, and its line, that is missing or not as the layout has it.
    """
    check_held_out(held_out)
    lists, facts = _read_lists(Path(root), _find_splits(Path(root), split_name))
    if held_out == "validation":
        lists = hold_out({name: train for name, (train, _) in lists.items()}, every=5, seed=seed)
    inputs = partial(
        ImageFiles, size=image_size, short_side=short_side, normalization=normalization, keep_megabytes=keep_megabytes
    )
    return make_sequence(lists, facts, inputs)


def _read_lists(root: Path, folder: Path) -> tuple[dict[str, tuple[Listed, Listed]], FactTable]:
    """By name of a split its training and test images; and the table of all facts."""
    seen: dict[int, _Fact] = {}
    words: dict[int, Words] = {}
    rows: dict[str, list[_Rows]] = {}
    for name in _split_names(folder):
        words |= _read_words(folder / f"{name}_facts.csv")
        rows[name] = [_read_rows(root, folder / f"{name}_{part}.csv", seen) for part in ("train", "test")]
    facts = _make_table(root / "NLP_feat", words, seen)
    row_of = {fact_id: row for row, fact_id in enumerate(facts.ids.tolist())}

    def listed(own: _Rows) -> Listed:
        return Listed(own.paths, [row_of[fact_id] for fact_id in own.fact_ids])

    return {name: (listed(train), listed(test)) for name, (train, test) in rows.items()}, facts


def _find_splits(root: Path, split_name: str) -> Path:
    folder = root / "splits"
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder 'splits'; give the folder that holds images, NLP_feat and splits as root"
        )
    known = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    if split_name not in known:
        raise unknown_name(f"folder of {folder}", split_name, known)
    return folder / split_name


def _split_names(folder: Path) -> list[str]:
    """B1, B2, ... as far as they are there."""
    names = itertools.takewhile(
        lambda name: (folder / f"{name}_train.csv").exists(), (f"B{index}" for index in itertools.count(1))
    )
    found = list(names)
    if not found:
        raise UserError(f"there is no B1_train.csv in {folder}; give a folder with B1_train.csv, B1_test.csv, ...")
    return found


def _read_words(path: Path) -> dict[int, Words]:
    return {
        _integer(values["id"], where): (values["S"], values["P"], values["O"])
        for where, values in read_lines(path, ("id", "S", "P", "O"))
    }


def _read_rows(root: Path, path: Path, seen: dict[int, _Fact]) -> _Rows:
    """The lines of one list; facts met for the first time are added to `seen`.

    Raises:
        UserError: a line contradicts what was seen of its fact.
    """
    rows = _Rows([], [])
    for where, values in read_lines(path, ("image_links", "NLP_links", "id", "w_s", "w_p", "w_o")):
        fact_id = _integer(values["id"], where)
        weights = tuple(_weight(values[column], where) for column in ("w_s", "w_p", "w_o"))
        fact = seen.setdefault(fact_id, _Fact(values["NLP_links"], weights, where))
        if fact.weights != weights:
            raise UserError(f"{where} gives fact {fact_id} the weights {weights}, but {fact.where} gave {fact.weights}")
        rows.paths.append(find_inside(root / "images", values["image_links"], listed_in=where))
        rows.fact_ids.append(fact_id)
    return rows


def _make_table(folder: Path, words: Mapping[int, Words], seen: Mapping[int, _Fact]) -> FactTable:
    """The table of the facts that have images, in the order of their ids."""
    ids = sorted(seen)
    for fact_id in ids:
        if fact_id not in words:
            raise UserError(f"{seen[fact_id].where} is of fact {fact_id}, which no B*_facts.csv lists; add it there")
    if not ids:
        raise UserError(f"the lists of images beside {folder} are empty; there is nothing to learn")
    weights = torch.tensor([seen[fact_id].weights for fact_id in ids])
    vectors = [_read_vectors(folder, seen[fact_id]) for fact_id in ids]
    for fact_id, own in zip(ids, vectors, strict=True):
        if own.shape != vectors[0].shape:
            sizes = f"{own.numel()} numbers, those of fact {ids[0]} {vectors[0].numel()}"
            raise UserError(f"the vectors of fact {fact_id} in {folder} have {sizes}; all facts need as many")
    filled = torch.stack(vectors) * (weights > 0)[:, :, None]
    known = [tuple(word if weight else "" for word, weight in zip(words[i], seen[i].weights, strict=True)) for i in ids]
    return FactTable(torch.tensor(ids), known, filled, weights)  # type: ignore[arg-type]  # three words each


def _read_vectors(folder: Path, fact: _Fact) -> Tensor:
    """The three vectors [3, V] of a file of 3 V numbers."""
    path = find_inside(folder, fact.vectors_link, listed_in=fact.where)
    try:
        numbers = torch.tensor([float(number) for number in path.read_text().replace(",", " ").split()])
    except (OSError, ValueError):
        raise UserError(f"cannot read numbers from {path}; it must hold the vectors of S, P and O") from None
    if len(numbers) == 0 or len(numbers) % 3:
        raise UserError(f"{path} must hold three vectors of one size, got {len(numbers)} numbers")
    return numbers.reshape(3, -1)


def _integer(value: str, where: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{where} must have a whole number as id, got '{value}'") from None


def _weight(value: str, where: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        return words[value.lower()] if value.lower() in words else float(value)
    except ValueError:
        raise UserError(f"{where} must have numbers as w_s, w_p and w_o, got '{value}'") from None
