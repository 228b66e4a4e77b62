"""Facts listed line by line with their images: any CSV or JSON Lines file, and a file of word vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from mas_embed.data import DATASETS, HeldOut, check_held_out
from mas_embed.data.images import ImageFiles, Normalization, find_inside
from mas_embed.errors import UserError
from mas_embed.facts.image_files import Listed, hold_out, make_sequence, read_lines
from mas_embed.facts.table import PROVIDES, FactSequence, Words, assign_facts, make_fact_table
from mas_embed.facts.word_vectors import read_word_vectors, words_of

Dealing = Literal["given", "random", "semantic"]
PARTS = ("train", "test")


class _Line(NamedTuple):
    """One image: its file, its fact's words, and the split and the part where the list names them."""

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
    splits: Dealing = "random",
    num_splits: int = 4,
    image_size: int = 224,
    short_side: int | None = None,
    normalization: Normalization = "imagenet",
    held_out: HeldOut = "test",
    keep_megabytes: int = 1024,
    seed: int = 0,
) -> FactSequence:
    """Images with their facts, one a line, as a sequence of splits.

    The list is CSV with a line of column names, or JSON Lines (`.jsonl`), and has `image` (a path inside `root`),
    `subject`, and `predicate` and `object`, which may be empty. Optional are `part` ("train" or "test"; without it a
    quarter of each fact's images, drawn at random, is the test part; see `hold_out` for images of several facts) and
    `split` (a name). Facts are numbered in the order in which they first occur; for their vectors see `make_fact_table`.

    Args:
        path: of the list.
        word_vectors: a file of word2vec or GloVe; see `read_word_vectors`.
        root: the folder of the images; None for the folder of the list.
        splits: "given" by the list's column `split`, in the order in which the names first occur; or facts are dealt
            "random" or "semantic", see `assign_facts`.
        num_splits: how many, where they are not given.
        image_size: pixels a side of the inputs, float32 [3, image_size, image_size].
        short_side: of an image before its centre is cut out; None for `image_size`.
        normalization: of colours, "imagenet" or "none" for values in [0, 1].
        held_out: what splits are judged by: "test", or "validation", a fifth of the training images of each fact, which are
            then not trained on; drawn as the test part is.
        keep_megabytes: how much memory the decoded images of a part may take; 0 to decode every time.
        seed: of the dealing and of the partition.

    Raises:
        UserError: names the line that cannot be used, or every word that has no vector.
    """
    check_held_out(held_out)
    if splits not in get_args(Dealing):
        raise UserError(f"splits must be 'given', 'random' or 'semantic', got '{splits}'")
    lines = _read(Path(path), Path(root) if root is not None else Path(path).parent, is_split_given=splits == "given")
    words = list(dict.fromkeys(line.words for line in lines))
    facts = make_fact_table(words, _vectors_of(words, Path(word_vectors)))
    row_of = {own: row for row, own in enumerate(words)}
    if splits == "given":
        names = {line: line.split for line in lines}
    else:
        dealt = assign_facts(facts, num_splits, by=splits, seed=seed).tolist()
        names = {line: str(dealt[row_of[line.words]] + 1) for line in lines}
    inputs = partial(
        ImageFiles, size=image_size, short_side=short_side, normalization=normalization, keep_megabytes=keep_megabytes
    )
    order = dict.fromkeys(names.values()) if splits == "given" else [str(index + 1) for index in range(num_splits)]
    by_split = {name: [line for line in lines if names[line] == name] for name in order}
    return make_sequence(_divide(by_split, row_of, held_out, seed), facts, inputs)


def _read(path: Path, root: Path, *, is_split_given: bool) -> list[_Line]:
    lines: list[_Line] = []
    for where, values in read_lines(path, ("image", "subject", *(("split",) if is_split_given else ()))):
        part, words = values.get("part", ""), (values["subject"], values.get("predicate", ""), values.get("object", ""))
        if part not in ("", *PARTS) or (lines and bool(part) != bool(lines[0].part)):
            raise UserError(f"{where} has the part '{part}'; every line must say 'train' or 'test', or none may")
        if not words[0] or (words[2] and not words[1]):
            raise UserError(f"{where} has the fact {words}; it needs a subject, and a predicate where it has an object")
        if is_split_given and not values["split"]:
            raise UserError(f"{where} names no split; every line must where splits are given")
        image = find_inside(root, values["image"], listed_in=where)
        lines.append(_Line(image, words, values.get("split", ""), part))
    if not lines:
        raise UserError(f"{path} lists no images")
    return lines


def _vectors_of(facts: list[Words], path: Path) -> dict[str, Tensor]:
    spelled = {word for fact in facts for phrase in fact for word in words_of(phrase)}
    return read_word_vectors(path, spelled | {word.lower() for word in spelled})


def _divide(
    lines: Mapping[str, list[_Line]], row_of: Mapping[Words, int], held_out: HeldOut, seed: int
) -> dict[str, tuple[Listed, Listed]]:
    """By name of a split the images to train on, and those to judge by."""

    def listed(part: str) -> dict[str, Listed]:
        return {name: _listed([line for line in own if line.part == part], row_of) for name, own in lines.items()}

    is_given = any(line.part for own in lines.values() for line in own)
    train, test = listed("train" if is_given else ""), listed("test")
    divided = {name: (train[name], test[name]) for name in lines} if is_given else hold_out(train, every=4, seed=seed)
    if held_out == "test":
        return divided
    return hold_out({name: own for name, (own, _) in divided.items()}, every=5, seed=seed)


def _listed(lines: list[_Line], row_of: Mapping[Words, int]) -> Listed:
    return Listed([line.path for line in lines], [row_of[line.words] for line in lines])
