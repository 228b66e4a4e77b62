"""The data set fact_digits: facts composed from scikit-learn's handwritten digits, without a download."""

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
ATTRIBUTES = ("mirrored", "lying", "large", "inverted", "framed", "striped")

# Digits that an attribute does not change visibly, so that the fact would look like another one
UNCHANGED_DIGITS = {"mirrored": ("zero", "one", "eight"), "lying": ("zero",)}

# By relation the differences, modulo ten, between the values of the object and the subject
DIFFERENCES = {"above": (1, 4, 6, 9), "left": (2, 4, 5, 7), "northwest": (1, 3, 5, 8)}

VECTOR_SIZE = 24
MOST_IMAGES = 1000  # of a fact, in a part


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
    """Splits of 186 facts, shown by handwritten digits (Alpaydin & Kaynak, 1998) at random positions of a canvas.

    There are 10 facts such as `<three>`, 56 such as `<three, mirrored>` (or lying, large, inverted, framed, striped, except
    where the digit would look like another fact), and 120 such as `<three, above, seven>` (or left, northwest). The images
    of the training, validation and test parts are composed from different handwritten digits: a quarter of every class is
    for test, and a fifth of the remaining ones for validation. The word vectors are random unit vectors of 24 numbers, the
    same for every seed; they distinguish the words but carry no meaning.

    Args:
        num_splits: at least 1, at most the number of facts.
        splits: how facts are grouped into splits, see `assign_facts`: "random", or "semantic", which here means that the
            facts of a split share words.
        image_size: height and width in pixels, 28 to 64.
        channels: 1, or 3 for images with three equal channels.
        train_images: number of training images of every fact, 1 to 1000.
        held_out_images: number of held-out images of every fact, 2 to 1000; they are both the queries and the gallery.
        held_out: the part on which splits are evaluated: "test" for reported figures, "validation" for choosing options.
        seed: of the partition of the digits, of the composed images, and of the assignment to splits.

    Returns:
        Splits named "1", "2", ...; the inputs are float32 [N, channels, image_size, image_size] in [0, 1].

    Raises:
        UserError: an option is outside its range.
    """
    check_held_out(held_out)
    if not 28 <= image_size <= 64 or channels not in (1, 3):
        raise UserError(
            f"image_size must lie between 28 and 64 and channels must be 1 or 3, got {image_size} and {channels}"
        )
    if not 1 <= train_images <= MOST_IMAGES or not 2 <= held_out_images <= MOST_IMAGES:
        raise UserError(
            f"a fact needs at least 1 training image and 2 held-out images, and at most {MOST_IMAGES} of each, got "
            f"train_images={train_images} and held_out_images={held_out_images}"
        )
    facts = digit_facts()
    split_of_fact = assign_facts(facts, num_splits, by=splits, seed=seed)
    parts = _compose_parts(facts, held_out, (train_images, held_out_images), image_size, seed)
    sequence = []
    for index in range(num_splits):
        train, evaluated = (_select_facts(part, split_of_fact == index, channels) for part in parts)
        sequence.append(Split(str(index + 1), train, query=evaluated, gallery=evaluated))
    return FactSequence(sequence, facts)


def digit_facts() -> FactTable:
    """The table of the 186 facts; those with fewer slots come first."""
    words: list[Words] = [(digit, "", "") for digit in DIGITS]
    words += [
        (digit, attribute, "")
        for attribute in ATTRIBUTES
        for digit in DIGITS
        if digit not in UNCHANGED_DIGITS.get(attribute, ())
    ]
    words += [
        (digit, relation, DIGITS[(value + difference) % 10])
        for relation, differences in DIFFERENCES.items()
        for value, digit in enumerate(DIGITS)
        for difference in differences
    ]
    vocabulary = (*DIGITS, *ATTRIBUTES, *DIFFERENCES)
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((len(vocabulary), VECTOR_SIZE)))
    return make_fact_table(words, dict(zip(vocabulary, vectors, strict=True)))


def _compose_parts(
    facts: FactTable, held_out: HeldOut, images_per_fact: tuple[int, int], size: int, seed: int
) -> tuple[Part, Part]:
    """The training and the held-out images of all facts, with one channel, in the order of the facts."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16
    values = torch.tensor(raw.target, dtype=torch.long)
    streams = (0, 1 if held_out == "test" else 2)
    parts = []
    for indices, count, stream in zip(partition(values, held_out, seed), images_per_fact, streams, strict=True):
        canvas = _Canvas(images[indices], values[indices], size, np.random.default_rng([seed, stream]))
        composed = torch.stack([canvas.compose(words) for words in facts.words for _ in range(count)])
        ids = torch.arange(len(composed)) + 2**32 * stream
        parts.append(Part(composed[:, None], torch.arange(len(facts)).repeat_interleave(count), ids))
    return parts[0], parts[1]


def _select_facts(part: Part, is_selected: Tensor, channels: int) -> Part:
    """The images of the selected facts [F], with the given number of channels."""
    mask = is_selected[part.labels]
    inputs = part.inputs[mask].expand(-1, channels, -1, -1).contiguous()
    return Part(inputs, part.labels[mask], part.ids[mask])


class _Canvas:
    """Composes images of facts from a set of digits; holds the state of its random generator."""

    def __init__(self, digits: Tensor, values: Tensor, size: int, generator: np.random.Generator) -> None:
        self._size, self._generator = size, generator
        self._cell = size // 2 - 4  # side of a digit of usual size: two fit side by side with room to move
        self._indices_by_value = [(values == value).nonzero()[:, 0].numpy() for value in range(10)]
        self._usual, self._large = (
            F.interpolate(digits[:, None], (side, side), mode="bilinear")[:, 0] for side in (self._cell, size - 6)
        )

    def compose(self, words: Words) -> Tensor:
        """An image [size, size] of the fact with these words."""
        subject, predicate, object_ = words
        image = torch.zeros(self._size, self._size)
        if not object_:
            tile = self._with_attribute(subject, predicate)
            self._paste(image, tile, *self._random_offsets(self._size - len(tile), 2))
            return image
        # Along each axis the first digit is in the first half and the second in the second half; an axis along which the
        # relation does not order the digits gives both nearly the same offset
        first, second = self._random_offsets(4, 2), self._random_offsets(4, 2) + self._size // 2
        if predicate != "northwest":
            axis = 1 if predicate == "above" else 0
            first[axis] = self._random_offsets(self._size - self._cell - 2, 1)[0]
            second[axis] = first[axis] + self._random_offsets(2, 1)[0]
        self._paste(image, self._draw(subject, self._usual), *first)
        self._paste(image, self._draw(object_, self._usual), *second)
        return image

    def _with_attribute(self, digit: str, attribute: str) -> Tensor:
        """A random image of a digit [side, side] with an attribute; "" for none."""
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

    def _draw(self, digit: str, images: Tensor) -> Tensor:
        """A random one of the images of a digit."""
        return images[int(self._generator.choice(self._indices_by_value[DIGITS.index(digit)]))]

    def _random_offsets(self, limit: int, count: int) -> NDArray[np.int64]:
        """Random integers from 0 to `limit`, both included [count]."""
        return self._generator.integers(0, limit + 1, size=count)

    @staticmethod
    def _paste(image: Tensor, tile: Tensor, top: int, left: int) -> None:
        image[top : top + len(tile), left : left + len(tile)] = tile
