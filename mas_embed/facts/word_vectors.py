"""The vectors of phrases, from the vectors of their words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mas_embed.errors import UserError
from mas_embed.runtime.text import printable, shortened
from mas_embed.runtime.word_vectors import read_word_vectors

__all__ = ["phrase_vectors", "read_word_vectors", "words_of"]


def words_of(phrase: str) -> list[str]:
    """The words of a phrase, which spaces or underscores separate.

    >>> words_of("black_circle")
    ['black', 'circle']
    """
    return [word for word in re.split(r"[\s_]+", phrase) if word] or [phrase]


def phrase_vectors(phrases: Iterable[str], word_vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By phrase the mean of the unit vectors of its words [V] float64.

    A word is looked up as it is written, then in lower case.

    Raises:
        UserError: words have no vector or a zero vector (the message lists all of them), or vectors differ in size.
    """
    phrases = list(phrases)
    lookup = {word: _lookup(word, word_vectors) for phrase in phrases for word in words_of(phrase)}
    missing = sorted(word for word, vector in lookup.items() if vector is None or not bool(vector.any()))
    if missing:
        raise UserError(
            f"{len(missing)} words have no vector: {', '.join(map(_shown, missing))}; add their vectors, or leave out their facts"
        )
    units = {word: vector.double() / vector.double().norm() for word, vector in lookup.items() if vector is not None}
    by_size = {len(unit): word for word, unit in units.items()}
    if len(by_size) > 1:
        sizes = ", ".join(f"{size} ('{_shown(word)}')" for size, word in by_size.items())
        raise UserError(f"word vectors must have one size, got {sizes}; take them from one file")
    return {phrase: torch.stack([units[word] for word in words_of(phrase)]).mean(0) for phrase in phrases}


def _lookup(word: str, word_vectors: Mapping[str, Tensor]) -> Tensor | None:
    return word_vectors.get(word, word_vectors.get(word.lower()))


def _shown(word: str) -> str:
    return shortened(printable(word), 60)
