"""Facts composed from scikit-learn's digits: the fact data that needs no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.data import DATASETS, HeldOut, Part, Split, check_held_out, partition
from mas_embed.errors import UserError
from mas_embed.facts.table import PROVIDES, FactSequence, FactTable, Grouping, Words, assign_facts, make_fact_table

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOKS_THE_SAME = {"mirrored": ("zero", "one", "eight"), "lying": ("zero",)}
ATTRIBUTES = ("mirrored", "lying", "large", "inverted", "framed", "striped")

# Which digits stand together: the differences of their values modulo ten
PARTNERS = {"above": (1, 4, 6, 9), "left": (2, 4, 5, 7), "northwest": (1, 3, 5, 8)}

VECTOR_SIZE = 24


@DATASETS.register("fact_digits", provides=PROVIDES)
def fact_digits(
    *,
    num_splits: int = 4,
    splits: Grouping = "random",
    image_size: int = 32,
    channels: Literal[1, 3] = 1,
    train_images: int = 24,
    held_out_images: int = 10,
    held_out: HeldOut = "test",
    seed: int = 0,
) -> FactSequence:
    """186 facts shown by handwritten digits on a canvas (Alpaydin & Kaynak, 1998), dealt into splits.

    10 facts `<three>`, 56 such as `<three, mirrored>` (or lying, large, inverted, framed, striped; what looks like another
    fact is left out) and 120 such as `<three, above, seven>` (or left, northwest). Digits stand at random places. The parts
    for training, validation and test are composed from different digits: a quarter of every class for test, a fifth of the
    rest for validation. Words have random unit vectors of 24 numbers, the same for every seed: they tell words apart and
    mean nothing.

    Args:
        num_splits: at least 1, at most the number of facts.
        splits: facts are dealt "random", or "semantic", which here means that they share words; see `assign_facts`.
        image_size: pixels a side, 28 to 64.
        channels: 1, or 3 for the same in three channels.
        train_images: of every fact.
        held_out_images: of every fact, at least 2; they are queries and gallery at once.
        held_out: what splits are judged by: "test" for figures that are reported, "validation" for choosing options.
        seed: of the partition of the digits, of the composing and of the dealing.

    Returns:
        Splits named "1", "2", ...; inputs float32 [N, channels, image_size, image_size] in [0, 1].

    Raises:
        UserError: an option outside its range.
    """
    check_held_out(held_out)
    if not 28 <= image_size <= 64 or channels not in (1, 3):
        raise UserError(f"image_size must lie between 28 and 64, channels be 1 or 3; got {image_size} and {channels}")
    if train_images < 1 or held_out_images < 2:
        raise UserError(
            f"a fact needs 1 training and 2 held-out images at least, got {train_images} and {held_out_images}"
        )
    facts = digit_facts()
    dealt = assign_facts(facts, num_splits, by=splits, seed=seed)
    train, judged = _compose_parts(facts, held_out, (train_images, held_out_images), image_size, seed)
    sequence = []
    for index in range(num_splits):
        own_train, own_judged = (_chosen(part, dealt == index, channels) for part in (train, judged))
        sequence.append(Split(str(index + 1), own_train, query=own_judged, gallery=own_judged))
    return FactSequence(sequence, facts)


def digit_facts() -> FactTable:
    """The table of the 186 facts, by rising order."""
    words: list[Words] = [(digit, "", "") for digit in DIGITS]
    words += [
        (digit, attribute, "")
        for attribute in ATTRIBUTES
        for digit in DIGITS
        if digit not in LOOKS_THE_SAME.get(attribute, ())
    ]
    words += [
        (digit, relation, DIGITS[(value + difference) % 10])
        for relation, differences in PARTNERS.items()
        for value, digit in enumerate(DIGITS)
        for difference in differences
    ]
    vocabulary = (*DIGITS, *ATTRIBUTES, *PARTNERS)
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((len(vocabulary), VECTOR_SIZE)))
    return make_fact_table(words, dict(zip(vocabulary, vectors, strict=True)))


def _compose_parts(
    facts: FactTable, held_out: HeldOut, per_fact: tuple[int, int], size: int, seed: int
) -> tuple[Part, Part]:
    """Images of all facts to train on and to judge by, greyscale, in the order of the facts."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16
    values = torch.tensor(raw.target, dtype=torch.long)
    streams = (0, 1 if held_out == "test" else 2)
    parts = []
    for indices, count, stream in zip(partition(values, held_out, seed), per_fact, streams, strict=True):
        canvas = _Canvas(images[indices], values[indices], size, np.random.default_rng([seed, stream]))
        composed = torch.stack([canvas.compose(words) for words in facts.words for _ in range(count)])
        ids = torch.arange(len(composed)) + 2**32 * stream
        parts.append(Part(composed[:, None], torch.arange(len(facts)).repeat_interleave(count), ids))
    return parts[0], parts[1]


def _chosen(part: Part, is_own: Tensor, channels: int) -> Part:
    """The images of some facts [F]."""
    chosen = is_own[part.labels]
    inputs = part.inputs[chosen].expand(-1, channels, -1, -1).contiguous()
    return Part(inputs, part.labels[chosen], part.ids[chosen])


class _Canvas:
    """Composes images of one size from some digits, with its own stream of random numbers."""

    def __init__(self, digits: Tensor, values: Tensor, size: int, generator: np.random.Generator) -> None:
        self._size, self._generator = size, generator
        self._cell = size // 2 - 4  # of a digit of usual size: two stand in a row with room to move
        self._positions = [(values == value).nonzero()[:, 0].numpy() for value in range(10)]
        self._usual, self._large = (
            F.interpolate(digits[:, None], (side, side), mode="bilinear")[:, 0] for side in (self._cell, size - 6)
        )

    def compose(self, words: Words) -> Tensor:
        """One image [size, size] of a fact."""
        subject, predicate, other = words
        image = torch.zeros(self._size, self._size)
        if not other:
            tile = self._altered(subject, predicate)
            self._paste(image, tile, *self._place(self._size - len(tile), 2))
            return image
        # Where two digits stand: along an axis one is in the first half, the other in the second, or they share a place
        first, second = self._place(4, 2), self._place(4, 2) + self._size // 2
        if predicate != "northwest":
            axis = 1 if predicate == "above" else 0
            first[axis] = self._place(self._size - self._cell - 2, 1)[0]
            second[axis] = first[axis] + self._place(2, 1)[0]
        self._paste(image, self._draw(subject, self._usual), *first)
        self._paste(image, self._draw(other, self._usual), *second)
        return image

    def _altered(self, digit: str, attribute: str) -> Tensor:
        """A digit with an attribute [side, side]."""
        tile = self._draw(digit, self._large if attribute == "large" else self._usual).clone()
        if attribute == "mirrored":
            return tile.flip(1)
        if attribute == "lying":
            return tile.rot90()
        if attribute == "inverted":
            return 1 - tile
        if attribute == "framed":
            return F.pad(F.pad(tile, [1] * 4), [1] * 4, value=1.0)
        if attribute == "striped":
            tile[::2] = 0
        return tile

    def _draw(self, digit: str, sheet: Tensor) -> Tensor:
        return sheet[int(self._generator.choice(self._positions[DIGITS.index(digit)]))]

    def _place(self, limit: int, count: int) -> NDArray[np.int64]:
        """Numbers from 0 to `limit`, both included [count]."""
        return self._generator.integers(0, limit + 1, size=count)

    @staticmethod
    def _paste(image: Tensor, tile: Tensor, top: int, left: int) -> None:
        image[top : top + len(tile), left : left + len(tile)] = tile
