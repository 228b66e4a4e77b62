"""The data set facts: a folder in the layout in which its authors released 6DS and LSC."""

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

from mas_embed.data import DATASETS, HeldOut, ImageFiles, check_held_out
from mas_embed.data.images import Normalization, find_inside
from mas_embed.data.listed_lines import read_lines
from mas_embed.errors import UserError, unknown_name
from mas_embed.facts.listed_images import ListedImages, hold_out, make_sequence
from mas_embed.facts.table import PROVIDES, FactSequence, FactTable, Words
from mas_embed.runtime.text import shortened

Weights = tuple[float, ...]  # of subject, predicate and object


class _ImageList(NamedTuple):
    """The image files of one list, and for each the id of its fact."""

    paths: list[Path]
    fact_ids: list[int]


class _ListedWords(NamedTuple):
    """The words of a fact, and the first line that gives them."""

    words: Words
    where: str


class _ListedFact(NamedTuple):
    """The vectors [3, V] and weights of a fact, and the first line of an image list that gives them."""

    vectors: Tensor
    weights: Weights
    where: str


@dataclass
class _FactRegister:
    """The facts that the files of a release have given so far, by id.

    Args:
        vectors_folder: the folder of the files of vectors.
        words: from the lists of facts.
        facts: from the lists of images.
        read_files: the fact and the link of every file of vectors that has been read.
    """

    vectors_folder: Path
    words: dict[int, _ListedWords] = field(default_factory=dict)
    facts: dict[int, _ListedFact] = field(default_factory=dict)
    read_files: set[tuple[int, str]] = field(default_factory=set)

    def add_words(self, fact_id: int, listed: _ListedWords) -> None:
        """Records the words of a fact.

        Raises:
            UserError: an earlier line gave the fact other words.
        """
        known = self.words.setdefault(fact_id, listed)
        if known.words != listed.words:
            raise UserError(
                f"{listed.where} gives fact {fact_id} the words {shortened(repr(listed.words))}, but {known.where} gave it "
                f"{shortened(repr(known.words))}; give every fact a different id"
            )

    def add_fact(self, fact_id: int, link: str, weights: Weights, where: str) -> None:
        """Records the weights of a fact and the vectors in the file that `link` names.

        Raises:
            UserError: an earlier line gave the fact other weights, or other vectors in slots with a weight.
        """
        known = self.facts.get(fact_id)
        if known is not None and known.weights != weights:
            raise UserError(
                f"{where} gives fact {fact_id} the weights {weights}, but {known.where} gave {known.weights}"
            )
        if (fact_id, link) in self.read_files:
            return
        self.read_files.add((fact_id, link))
        path = find_inside(self.vectors_folder, link, listed_in=where)
        fact = _ListedFact(_read_vectors(path, weights), weights, where)
        known = self.facts.setdefault(fact_id, fact)
        if not torch.equal(known.vectors, fact.vectors):
            raise UserError(
                f"{where} gives fact {fact_id} the vectors of {path}, which differ from those that {known.where} gave it; "
                "every line of a fact must give the same vectors"
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
    """The splits in a folder with the layout of 6DS and LSC (Aljundi et al., 2018; Elhoseiny et al., 2018).

    `splits/<split_name>/B{k}_train.csv` and `B{k}_test.csv` list the images of split k = 1, 2, ..., without a gap, and
    `B{k}_facts.csv` the words of its facts. Each line of an image list names a file in `NLP_feat/` that holds the vectors of
    its fact; slots whose weight is 0 get a zero vector. Images are decoded when they are used. An image that is listed as
    .jpg may be a .png file (see `find_inside`), and greyscale is converted to RGB. The rows of the table of facts are in the
    order of the facts' ids.

    Args:
        root: the folder that contains `images/`, `NLP_feat/` and `splits/`.
        split_name: the name of a folder in `splits/`.
        image_size: height and width of the inputs in pixels; the inputs are float32 [3, image_size, image_size].
        short_side: the length in pixels to which the shorter side of an image is resized before the centre crop (the release:
            256 for 224); None for `image_size`.
        normalization: of colours, "imagenet" or "none" for values in [0, 1].
        held_out: the part on which splits are evaluated: "test" (the training part is then that of the release), or
            "validation". The validation part is a fifth of the training images of each fact, which are then not trained on;
            an image with several facts, in whichever splits, is on one side with all of them.
        keep_megabytes: the memory that the decoded images of a part may take; 0 to decode an image each time it is used.
        seed: of the division into training and validation images.

    Raises:
        UserError: a file is missing, does not have the layout, or contradicts an earlier line; the message names the file and
            the line.
    """
    check_held_out(held_out)
    images_by_split, facts = _read_splits(Path(root), _find_split_folder(Path(root), split_name))
    if held_out == "validation":
        images_by_split = hold_out({name: train for name, (train, _) in images_by_split.items()}, every=5, seed=seed)
    make_inputs = partial(
        ImageFiles, size=image_size, short_side=short_side, normalization=normalization, keep_megabytes=keep_megabytes
    )
    return make_sequence(images_by_split, facts, make_inputs)


def _read_splits(root: Path, folder: Path) -> tuple[dict[str, tuple[ListedImages, ListedImages]], FactTable]:
    """By name of a split its training and its test images; and the table of all facts."""
    register = _FactRegister(root / "NLP_feat")
    lists: dict[str, list[_ImageList]] = {}
    for name in _split_names(folder):
        _read_words(folder / f"{name}_facts.csv", register)
        lists[name] = [_read_images(root, folder / f"{name}_{part}.csv", register) for part in ("train", "test")]
    facts = _make_table(register)
    row_of = {fact_id: row for row, fact_id in enumerate(facts.ids.tolist())}

    def with_labels(images: _ImageList) -> ListedImages:
        return ListedImages(images.paths, [row_of[fact_id] for fact_id in images.fact_ids])

    return {name: (with_labels(train), with_labels(test)) for name, (train, test) in lists.items()}, facts


def _find_split_folder(root: Path, split_name: str) -> Path:
    """The folder of the lists.

    Raises:
        UserError: there is no such folder.
    """
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
    """The names B1, B2, ... up to the largest number in a file name of the folder.

    Raises:
        UserError: the list of training or test images of a split is missing.
    """
    matches = (re.fullmatch(r"B(\d{1,4})_(train|test|facts)\.csv", entry.name) for entry in folder.iterdir())
    names = [f"B{index}" for index in range(1, 1 + max((int(match[1]) for match in matches if match), default=1))]
    for name, part in itertools.product(names, ("train", "test")):
        if not (folder / f"{name}_{part}.csv").is_file():
            raise UserError(
                f"there is no {name}_{part}.csv in {folder}; give a folder with B1_train.csv, B1_test.csv, ... "
                f"up to B{len(names)}"
            )
    return names


def _read_words(path: Path, register: _FactRegister) -> None:
    """Adds the facts of one list of facts to the register."""
    for where, values in read_lines(path, ("id", "S", "P", "O")):
        words = values["S"], values["P"], values["O"]
        register.add_words(_parse_id(values["id"], where), _ListedWords(words, where))


def _read_images(root: Path, path: Path, register: _FactRegister) -> _ImageList:
    """The images of one list, whose facts are added to the register."""
    images = _ImageList([], [])
    for where, values in read_lines(path, ("image_links", "NLP_links", "id", "w_s", "w_p", "w_o")):
        fact_id = _parse_id(values["id"], where)
        weights = tuple(_parse_weight(values[column], where) for column in ("w_s", "w_p", "w_o"))
        register.add_fact(fact_id, values["NLP_links"], weights, where)
        images.paths.append(find_inside(root / "images", values["image_links"], listed_in=where))
        images.fact_ids.append(fact_id)
    return images


def _make_table(register: _FactRegister) -> FactTable:
    """The table of the facts that have images, in the order of their ids.

    Raises:
        UserError: there is no image, a fact has no words, or the vectors of facts differ in size.
    """
    facts = dict(sorted(register.facts.items()))
    if not facts:
        raise UserError(f"the lists of images beside {register.vectors_folder} are empty; there is nothing to learn")
    ids = list(facts)
    for fact_id, fact in facts.items():
        if fact_id not in register.words:
            raise UserError(f"{fact.where} has the fact {fact_id}, which no B*_facts.csv lists; add it there")
        if fact.vectors.shape != facts[ids[0]].vectors.shape:
            raise UserError(
                f"the vectors of fact {fact_id} in {register.vectors_folder} have {fact.vectors.numel()} numbers, but those "
                f"of fact {ids[0]} have {facts[ids[0]].vectors.numel()}; all facts must have vectors of one size"
            )
    words = [_words_with_weight(register.words[fact_id], fact) for fact_id, fact in facts.items()]
    vectors = torch.stack([fact.vectors for fact in facts.values()])
    return FactTable(torch.tensor(ids), words, vectors, torch.tensor([fact.weights for fact in facts.values()]))


def _words_with_weight(listed: _ListedWords, fact: _ListedFact) -> Words:
    """The words of the slots that have a weight, "" in the other slots.

    Raises:
        UserError: a slot that has a weight has no word.
    """
    subject, predicate, object_ = (
        word if weight else "" for word, weight in zip(listed.words, fact.weights, strict=True)
    )
    if [bool(word) for word in (subject, predicate, object_)] != [weight > 0 for weight in fact.weights]:
        raise UserError(
            f"{listed.where} has the words {shortened(repr(listed.words))}, but {fact.where} gives them the weights "
            f"{fact.weights}; slots with a weight need words"
        )
    return subject, predicate, object_


def _read_vectors(path: Path, weights: Weights) -> Tensor:
    """The three vectors [3, V] of a file of 3 V numbers, zero in slots whose weight is 0."""
    try:
        numbers = torch.tensor([float(number) for number in path.read_text(encoding="utf-8").replace(",", " ").split()])
    except (OSError, ValueError):
        raise UserError(f"cannot read numbers from {path}; it must hold the vectors of S, P and O") from None
    if len(numbers) == 0 or len(numbers) % 3:
        raise UserError(f"{path} must hold three vectors of one size, got {len(numbers)} numbers")
    vectors = numbers.reshape(3, -1).masked_fill(torch.tensor(weights)[:, None] == 0, 0)
    if not bool(vectors.isfinite().all()):
        raise UserError(f"{path} holds a number that is not finite, or too large for 32 bits")
    return vectors


def _parse_id(value: str, where: str) -> int:
    """The id of a fact; some programs write it as a decimal number such as 7.0."""
    whole = re.fullmatch(r"([+-]?[0-9]{1,19})(\.0*)?", value)
    if whole is None or not -(2**63) <= int(whole[1]) < 2**63:
        raise UserError(f"{where} must have a whole number of 64 bits as id, got {shortened(repr(value))}")
    return int(whole[1])


def _parse_weight(value: str, where: str) -> float:
    """The weight of a slot; "true" is 1 and "false" is 0."""
    words = {"true": 1.0, "false": 0.0}
    try:
        weight = words[value.lower()] if value.lower() in words else float(value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{where} must have numbers >= 0 as w_s, w_p and w_o, got {shortened(repr(value))}")
    return weight
