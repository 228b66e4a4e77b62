"""The data set fact_list: images and their facts from a CSV or JSON Lines file, with a file of word vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from mas_embed.data import DATASETS, HeldOut, ImageFiles, check_held_out
from mas_embed.data.images import Normalization, find_inside
from mas_embed.data.listed_lines import read_lines
from mas_embed.errors import UserError
from mas_embed.facts.listed_images import ListedImages, hold_out, make_sequence
from mas_embed.facts.table import PROVIDES, FactSequence, Words, assign_facts, make_fact_table
from mas_embed.facts.word_vectors import read_word_vectors, words_of
from mas_embed.runtime.text import shortened

ListGrouping = Literal["given", "random", "semantic"]
PARTS = ("train", "test")


class _Line(NamedTuple):
    """One image: its file, the words of its fact, and its split and part, "" where the list does not name them."""

    path: Path
    words: Words
    split: str
    part: str


@DATASETS.register("fact_list", provides=PROVIDES)
def read_fact_list(
    *,
    path: str,
    word_vectors: str,
    root: str | None = None,
    splits: ListGrouping = "random",
    num_splits: int = 4,
    image_size: int = 224,
    short_side: int | None = None,
    normalization: Normalization = "imagenet",
    held_out: HeldOut = "test",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> FactSequence:
    """A sequence of splits from a list of images with one fact per line.

    The list is a CSV file with a line of column names, or a JSON Lines file (`.jsonl`). Every line has the columns `image`
    (a path inside `root`) and `subject`, and may have `predicate` and `object`. The column `part` ("train" or "test") is
    optional: without it a random quarter of the images of each fact is the test part; see `hold_out` for images with several
    facts. The column `split` (the name of a split) is optional too. Facts are numbered in the order of their first lines;
    their vectors are those of `make_fact_table`.

    Args:
        path: of the list.
        word_vectors: a word2vec or GloVe file; see `read_word_vectors`.
        root: the folder of the images; None for the folder of the list.
        splits: how images are assigned to splits: "given" by the column `split`, where splits are in the order of their first
            lines; or by their facts, which are grouped "random" or "semantic", see `assign_facts`.
        num_splits: the number of splits; ignored if they are "given".
        image_size: height and width of the inputs in pixels; the inputs are float32 [3, image_size, image_size].
        short_side: the length in pixels to which the shorter side of an image is resized before the centre crop; None for
            `image_size`.
        normalization: of colours, "imagenet" or "none" for values in [0, 1].
        held_out: the part on which splits are evaluated: "test", or "validation". The validation part is a fifth of the
            training images of each fact, which are then not trained on; it is drawn like the test part.
        keep_megabytes: the memory that the decoded images of a part may take; 0 to decode an image each time it is used.
        seed: of the assignment to splits and of the held-out parts.

    Raises:
        UserError: a line cannot be used (the message names it), or words have no vector (the message lists all of them).
    """
    check_held_out(held_out)
    if splits not in get_args(ListGrouping):
        raise UserError(f"splits must be 'given', 'random' or 'semantic', got '{splits}'")
    lines = _read_list(Path(path), Path(path).parent if root is None else Path(root), needs_split=splits == "given")
    words = list(dict.fromkeys(line.words for line in lines))
    facts = make_fact_table(words, _read_vectors_of(words, Path(word_vectors)))
    row_of = {fact: row for row, fact in enumerate(words)}
    if splits == "given":
        name_of = {line: line.split for line in lines}
        names = list(dict.fromkeys(name_of.values()))
    else:
        split_of_fact = assign_facts(facts, num_splits, by=splits, seed=seed).tolist()
        name_of = {line: str(split_of_fact[row_of[line.words]] + 1) for line in lines}
        names = [str(index + 1) for index in range(num_splits)]
    make_inputs = partial(
        ImageFiles, size=image_size, short_side=short_side, normalization=normalization, keep_megabytes=keep_megabytes
    )
    lines_by_split = {name: [line for line in lines if name_of[line] == name] for name in names}
    return make_sequence(_divide_into_parts(lines_by_split, row_of, held_out, seed), facts, make_inputs)


def _read_list(path: Path, root: Path, *, needs_split: bool) -> list[_Line]:
    """The lines of the list, in order.

    Raises:
        UserError: the list has no lines, or a line cannot be used.
    """
    lines: list[_Line] = []
    for where, values in read_lines(path, ("image", "subject", *(("split",) if needs_split else ()))):
        part, words = values.get("part", ""), (values["subject"], values.get("predicate", ""), values.get("object", ""))
        if part not in ("", *PARTS) or (lines and bool(part) != bool(lines[0].part)):
            raise UserError(
                f"{where} has the part {shortened(repr(part))}; every line must have 'train' or 'test', or none may have any"
            )
        if not words[0] or (words[2] and not words[1]):
            raise UserError(
                f"{where} has the fact {shortened(repr(words))}; it needs a subject, and a predicate where it has an object"
            )
        if needs_split and not values["split"]:
            raise UserError(f"{where} names no split; with splits='given' every line must name one")
        image = find_inside(root, values["image"], listed_in=where)
        lines.append(_Line(image, words, values.get("split", ""), part))
    if not lines:
        raise UserError(f"{path} lists no images")
    return lines


def _read_vectors_of(facts: list[Words], path: Path) -> dict[str, Tensor]:
    """The vectors of the words of the facts, as they are written and in lower case."""
    spelled = {word for fact in facts for phrase in fact for word in words_of(phrase)}
    return read_word_vectors(path, spelled | {word.lower() for word in spelled})


def _divide_into_parts(
    lines_by_split: Mapping[str, list[_Line]], row_of: Mapping[Words, int], held_out: HeldOut, seed: int
) -> dict[str, tuple[ListedImages, ListedImages]]:
    """By name of a split its training images and its held-out images."""

    def images_of_part(part: str) -> dict[str, ListedImages]:
        return {
            name: _as_images([line for line in lines if line.part == part], row_of)
            for name, lines in lines_by_split.items()
        }

    if any(line.part for lines in lines_by_split.values() for line in lines):
        train, test = images_of_part("train"), images_of_part("test")
        divided = {name: (train[name], test[name]) for name in lines_by_split}
    else:
        divided = hold_out(images_of_part(""), every=4, seed=seed)
    if held_out == "test":
        return divided
    return hold_out({name: train for name, (train, _) in divided.items()}, every=5, seed=seed)


def _as_images(lines: list[_Line], row_of: Mapping[Words, int]) -> ListedImages:
    return ListedImages([line.path for line in lines], [row_of[line.words] for line in lines])
