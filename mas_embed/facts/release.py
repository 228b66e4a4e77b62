"""Facts in the layout in which the authors released 6DS and LSC."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mas_embed.data import DATASETS, HeldOut, check_held_out
from mas_embed.data.images import ImageFiles, Normalization, find_inside
from mas_embed.errors import UserError, unknown_name
from mas_embed.facts.image_files import Listed, hold_out, make_sequence, read_lines
from mas_embed.facts.table import PROVIDES, FactSequence, FactTable, Words

Weights = tuple[float, ...]  # of the three slots


class _Rows(NamedTuple):
    """The lines of one list of images."""

    paths: list[Path]
    fact_ids: list[int]


class _Spelled(NamedTuple):
    """The words of a fact, and where they are listed."""

    words: Words
    where: str


class _Fact(NamedTuple):
    """What the lines of an image list say of its fact, and where."""

    vectors: Tensor
    weights: Weights
    where: str


@dataclass
class _Lists:
    """What the lists of a release say of facts, by their ids.

    Args:
        vectors_folder: the folder of the files of vectors.
        spelled: what lists of facts say.
        seen: what lists of images say.
        read: the id and the link of every file of vectors that was read.
    """

    vectors_folder: Path
    spelled: dict[int, _Spelled] = field(default_factory=dict)
    seen: dict[int, _Fact] = field(default_factory=dict)
    read: set[tuple[int, str]] = field(default_factory=set)

    def add_words(self, fact_id: int, own: _Spelled) -> None:
        """Raises `UserError` if the fact was listed with other words."""
        known = self.spelled.setdefault(fact_id, own)
        if known.words != own.words:
            raise UserError(
                f"{own.where} gives fact {fact_id} the words {own.words}, but {known.where} gave it {known.words}; "
                "give each fact an id of its own"
            )

    def add_image(self, fact_id: int, link: str, weights: Weights, where: str) -> None:
        """Raises `UserError` if the fact was seen with other weights, or with other vectors where its weights are not 0."""
        fact = self.seen.get(fact_id)
        if fact is not None and fact.weights != weights:
            raise UserError(f"{where} gives fact {fact_id} the weights {weights}, but {fact.where} gave {fact.weights}")
        if (fact_id, link) in self.read:
            return
        self.read.add((fact_id, link))
        path = find_inside(self.vectors_folder, link, listed_in=where)
        own = _Fact(_read_vectors(path, weights), weights, where)
        known = self.seen.setdefault(fact_id, own)
        if not torch.equal(known.vectors, own.vectors):
            raise UserError(
                f"{where} gives fact {fact_id} the vectors of {path}, which are not those that {known.where} gave it; "
                "every line of a fact needs the same numbers"
            )


@DATASETS.register("facts", provides=PROVIDES)
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

    Split k is what `splits/<split_name>/B{k}_{train,test}.csv` list, k = 1, 2, ... without a gap. A fact's words are those
    of `B{k}_facts.csv`; its vectors the numbers of the files in `NLP_feat/` that its lines name, and zero in slots whose
    weight is 0. Images are decoded on demand; one that is listed as .jpg may be there as .png (see `find_inside`), and
    greyscale becomes RGB. Rows of the table of facts are in the order of the facts' ids.

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
        UserError: names the file, and its line, that is missing, not as the layout has it, or contradicts an earlier line.
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
    lists = _Lists(root / "NLP_feat")
    rows: dict[str, list[_Rows]] = {}
    for name in _split_names(folder):
        _read_words(folder / f"{name}_facts.csv", lists)
        rows[name] = [_read_rows(root, folder / f"{name}_{part}.csv", lists) for part in ("train", "test")]
    facts = _make_table(lists)
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
    """B1, B2, ... up to the largest number that a file of the folder has.

    Raises:
        UserError: one of them lacks its list of training or test images.
    """
    listed = (re.fullmatch(r"B(\d{1,4})_(train|test|facts)\.csv", entry.name) for entry in folder.iterdir())
    names = [f"B{index}" for index in range(1, 1 + max((int(match[1]) for match in listed if match), default=1))]
    for name, part in itertools.product(names, ("train", "test")):
        if not (folder / f"{name}_{part}.csv").is_file():
            raise UserError(
                f"there is no {name}_{part}.csv in {folder}; give a folder with B1_train.csv, B1_test.csv, ... "
                f"up to B{len(names)}"
            )
    return names


def _read_words(path: Path, lists: _Lists) -> None:
    for where, values in read_lines(path, ("id", "S", "P", "O")):
        lists.add_words(_integer(values["id"], where), _Spelled((values["S"], values["P"], values["O"]), where))


def _read_rows(root: Path, path: Path, lists: _Lists) -> _Rows:
    """The lines of one list of images."""
    rows = _Rows([], [])
    for where, values in read_lines(path, ("image_links", "NLP_links", "id", "w_s", "w_p", "w_o")):
        fact_id = _integer(values["id"], where)
        weights = tuple(_weight(values[column], where) for column in ("w_s", "w_p", "w_o"))
        lists.add_image(fact_id, values["NLP_links"], weights, where)
        rows.paths.append(find_inside(root / "images", values["image_links"], listed_in=where))
        rows.fact_ids.append(fact_id)
    return rows


def _make_table(lists: _Lists) -> FactTable:
    """The table of the facts that have images, in the order of their ids."""
    seen = dict(sorted(lists.seen.items()))
    if not seen:
        raise UserError(f"the lists of images beside {lists.vectors_folder} are empty; there is nothing to learn")
    ids = list(seen)
    for fact_id, fact in seen.items():
        if fact_id not in lists.spelled:
            raise UserError(f"{fact.where} is of fact {fact_id}, which no B*_facts.csv lists; add it there")
        if fact.vectors.shape != seen[ids[0]].vectors.shape:
            sizes = f"{fact.vectors.numel()} numbers, those of fact {ids[0]} {seen[ids[0]].vectors.numel()}"
            raise UserError(
                f"the vectors of fact {fact_id} in {lists.vectors_folder} have {sizes}; all facts need as many"
            )
    words = [_filled_words(lists.spelled[fact_id], fact) for fact_id, fact in seen.items()]
    vectors = torch.stack([fact.vectors for fact in seen.values()])
    return FactTable(torch.tensor(ids), words, vectors, torch.tensor([fact.weights for fact in seen.values()]))


def _filled_words(spelled: _Spelled, fact: _Fact) -> Words:
    """The words of the slots that have a weight.

    Raises:
        UserError: one of them has no word.
    """
    subject, predicate, object_ = (
        word if weight else "" for word, weight in zip(spelled.words, fact.weights, strict=True)
    )
    if [bool(word) for word in (subject, predicate, object_)] != [weight > 0 for weight in fact.weights]:
        raise UserError(
            f"{spelled.where} has the words {spelled.words}, but {fact.where} gives them the weights {fact.weights}; "
            "slots with a weight need words"
        )
    return subject, predicate, object_


def _read_vectors(path: Path, weights: Weights) -> Tensor:
    """The three vectors [3, V] of a file of 3 V numbers, zero in slots whose weight is 0."""
    try:
        numbers = torch.tensor([float(number) for number in path.read_text().replace(",", " ").split()])
    except (OSError, ValueError):
        raise UserError(f"cannot read numbers from {path}; it must hold the vectors of S, P and O") from None
    if len(numbers) == 0 or len(numbers) % 3:
        raise UserError(f"{path} must hold three vectors of one size, got {len(numbers)} numbers")
    vectors = numbers.reshape(3, -1).masked_fill(torch.tensor(weights)[:, None] == 0, 0)
    if not bool(vectors.isfinite().all()):
        raise UserError(f"{path} holds a number that is not finite, or too large for 32 bits")
    return vectors


def _integer(value: str, where: str) -> int:
    """An id, which some writers give a fraction of zero."""
    whole = re.fullmatch(r"([+-]?[0-9]{1,19})(\.0*)?", value)
    if whole is None or not -(2**63) <= int(whole[1]) < 2**63:
        raise UserError(f"{where} must have a whole number of 64 bits as id, got '{value}'")
    return int(whole[1])


def _weight(value: str, where: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        weight = words[value.lower()] if value.lower() in words else float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{where} must have numbers >= 0 as w_s, w_p and w_o, got '{value}'")
    return weight
