"""Facts: the words of a subject, a predicate and an object, their vectors, and how they are dealt into splits.

F facts, V size of a word vector; slots are in the order subject, predicate, object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mas_embed.data import Split, SplitSequence
from mas_embed.errors import UserError
from mas_embed.facts.word_vectors import phrase_vectors

Words = tuple[str, str, str]
PROVIDES = ("facts", "vector_size")  # by every data set of facts
Grouping = Literal["random", "semantic"]


@dataclass(frozen=True)
class FactTable:
    """The facts of a data set. A label of an image is a row of this table.

    Args:
        ids: [F] int64, the numbers that the facts have where they come from.
        words: F times the words of subject, predicate and object, "" for an absent slot.
        vectors: [F, 3, V], the target of each slot; zero where a slot is absent (a wildcard).
        weights: [F, 3], how much each slot counts in the loss, >= 0; 0 where a slot is absent.

    Raises:
        UserError: sizes that differ, a vector or weight that is not finite, a fact without any slot, or one whose words
            and weights fill different slots.
    """

    ids: Tensor
    words: list[Words]
    vectors: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(self.ids.shape), (len(self.words),), self.vectors.shape[:2], tuple(self.weights.shape)]
        num_facts = len(self.words)
        if shapes != [(num_facts,), (num_facts,), (num_facts, 3), (num_facts, 3)] or self.vectors.ndim != 3:
            raise UserError(f"a table of {num_facts} facts needs ids [F], vectors [F, 3, V] and weights [F, 3]")
        if not bool(self.vectors.isfinite().all()) or not bool(
            (self.weights >= 0).all() & self.weights.isfinite().all()
        ):
            raise UserError("the vectors of facts must be finite, and their weights finite and >= 0")
        for number, words, weights in zip(self.ids.tolist(), self.words, self.weights.tolist(), strict=True):
            if not any(weights) or [bool(word) for word in words] != [weight > 0 for weight in weights]:
                raise UserError(
                    f"fact {number} has the words {words} and the weights {weights}; exactly the slots with a weight above 0, "
                    "at least one, need words"
                )

    def __len__(self) -> int:
        return len(self.words)

    @property
    def orders(self) -> Tensor:
        """How many slots each fact fills [F]: 1 for `<S>`, 2 for `<S, P>`, 3 for `<S, P, O>`."""
        return (self.weights > 0).sum(1)

    @property
    def targets(self) -> Tensor:
        """Subject, predicate and object side by side [F, 3 V]: what an image of the fact is to be embedded as."""
        return self.vectors.flatten(1)

    @property
    def names(self) -> list[str]:
        """The facts as they are written: `<three, above, seven>`."""
        return [f"<{', '.join(word for word in words if word)}>" for words in self.words]


class FactSequence(SplitSequence):
    """A sequence of splits whose labels are rows of one table of facts.

    Args:
        splits: in the order in which they are learned.
        facts: of all splits.
    """

    def __init__(self, splits: Iterable[Split], facts: FactTable) -> None:
        rows_by_name: dict[str, list[int]] = {}
        for row, name in enumerate(facts.names):
            rows_by_name.setdefault(name, []).append(row)
        provides = {"facts": facts, "vector_size": facts.vectors.shape[2]}
        super().__init__(splits, label_names=rows_by_name, provides=provides)
        self.facts = facts


def make_fact_table(words: Sequence[Words], word_vectors: Mapping[str, Tensor]) -> FactTable:
    """The table of facts given by their words, numbered from 0.

    A slot's vector is the mean of the unit vectors of its words, less the mean over the facts that fill the slot; an
    absent slot has a zero vector and weight 0, any other weight 1 (Elhoseiny et al., 2017).

    Args:
        words: F times subject, predicate and object, "" for an absent slot.
        word_vectors: by word [V]; see `read_word_vectors`.

    Raises:
        UserError: names every word that has no vector; vectors of different sizes; a fact without words; no facts.

    Example:
        >>> vectors = {"three": torch.tensor([3.0, 0.0]), "seven": torch.tensor([0.0, 2.0])}
        >>> make_fact_table([("three", "", ""), ("seven", "", "")], vectors).targets.tolist()
        [[0.5, -0.5, 0.0, 0.0, 0.0, 0.0], [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]
    """
    if not words:
        raise UserError("there are no facts; give at least one subject")
    phrases = sorted({word for fact in words for word in fact if word})
    vectors_by_phrase = phrase_vectors(phrases, word_vectors)
    size = max((len(vector) for vector in vectors_by_phrase.values()), default=1)  # all are of one
    vectors = torch.zeros(len(words), 3, size, dtype=torch.float64)
    weights = torch.tensor([[float(bool(word)) for word in fact] for fact in words], dtype=torch.float64)
    for row, fact in enumerate(words):
        for slot, word in enumerate(fact):
            if word:
                vectors[row, slot] = vectors_by_phrase[word]
    mean = vectors.sum(0) / weights.sum(0).clamp_min(1)[:, None]
    centred = (vectors - mean) * weights[:, :, None]
    return FactTable(torch.arange(len(words)), list(words), centred.float(), weights.float())


def assign_facts(facts: FactTable, num_splits: int, *, by: Grouping = "random", seed: int = 0) -> Tensor:
    """The split of every fact [F] int64; sizes of splits differ by one fact at most.

    Args:
        facts: what is dealt.
        num_splits: at least 1, at most F.
        by: "random", or "semantic": facts with similar vectors go together. Their vectors [F, 3 V] are clustered by
            k-means, then facts go to the centre they are nearest to that has room, the nearest pairs first.
        seed: of the permutation, or of k-means.

    Raises:
        UserError: more splits than facts (or, for "semantic", than different vectors), or an unknown grouping.
    """
    if by not in get_args(Grouping):
        raise UserError(f"facts are dealt 'random' or 'semantic', got '{by}'")
    distinct = len(facts.targets.unique(dim=0)) if by == "semantic" else len(facts)
    if not 1 <= num_splits <= distinct:
        raise UserError(
            f"num_splits must lie between 1 and {distinct}, the number of facts that differ, got {num_splits}"
        )
    if by == "random":
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(facts)))
        return (torch.arange(len(facts)) % num_splits)[order.argsort()]
    from sklearn.cluster import KMeans

    targets = facts.targets.double().numpy()
    distances = KMeans(num_splits, n_init=10, random_state=seed).fit(targets).transform(targets)
    return torch.from_numpy(_nearest_with_room(distances))


def _nearest_with_room(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """The group of every fact [F] from its distances to the groups [F, S], the nearest pairs first."""
    num_facts, num_splits = distances.shape
    room, num_larger = divmod(num_facts, num_splits)  # this many groups take one fact more
    groups, sizes = np.full(num_facts, -1), np.zeros(num_splits, dtype=int)
    for fact, split in zip(
        *np.unravel_index(distances.argsort(axis=None, kind="stable"), distances.shape), strict=True
    ):
        takes_one_more = sizes[split] == room and num_larger > 0
        if groups[fact] < 0 and (sizes[split] < room or takes_one_more):
            groups[fact] = split
            sizes[split] += 1
            num_larger -= takes_one_more
    return groups
