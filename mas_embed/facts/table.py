"""The table of facts: words and vectors of subject, predicate and object, and the assignment of facts to splits.

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
from mas_embed.runtime.checks import check_at_least

Words = tuple[str, str, str]
PROVIDES = ("facts", "vector_size")  # every data set of facts provides these to the other components of a config
Grouping = Literal["random", "semantic"]


@dataclass(frozen=True)
class FactTable:
    """The facts of a data set. The label of an image is the row of its fact in this table.

    Args:
        ids: [F] int64, the numbers of the facts in the source of the data.
        words: for each of the F facts the words of subject, predicate and object; "" for an absent slot.
        vectors: [F, 3, V], the target of each slot; zero where a slot is absent (a wildcard).
        weights: [F, 3], how much each slot counts in the loss, >= 0; 0 where a slot is absent.

    Raises:
        UserError: the sizes differ, a vector or weight is not finite, a fact has no slot, or the slots with words are not
            the slots with weights.
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
        for fact_id, words, weights in zip(self.ids.tolist(), self.words, self.weights.tolist(), strict=True):
            if not any(weights) or [bool(word) for word in words] != [weight > 0 for weight in weights]:
                raise UserError(
                    f"fact {fact_id} has the words {words} and the weights {weights}; exactly the slots with a weight above 0 "
                    "must have a word, and there must be at least one"
                )

    def __len__(self) -> int:
        return len(self.words)

    @property
    def orders(self) -> Tensor:
        """The number of slots that each fact fills [F]: 1 for `<S>`, 2 for `<S, P>`, 3 for `<S, P, O>`."""
        return (self.weights > 0).sum(1)

    @property
    def targets(self) -> Tensor:
        """The vectors of subject, predicate and object side by side [F, 3 V]: the target of an image's embedding."""
        return self.vectors.flatten(1)

    @property
    def names(self) -> list[str]:
        """The facts as text, such as `<three, above, seven>`."""
        return [f"<{', '.join(word for word in words if word)}>" for words in self.words]


class FactSequence(SplitSequence):
    """A sequence of splits whose labels are rows of one table of facts.

    It provides `facts` and `vector_size` to the other components of a config.

    Args:
        splits: in the order in which they are learned.
        facts: the table for all splits.
    """

    def __init__(self, splits: Iterable[Split], facts: FactTable) -> None:
        rows_by_name: dict[str, list[int]] = {}
        for row, name in enumerate(facts.names):
            rows_by_name.setdefault(name, []).append(row)
        provides = {"facts": facts, "vector_size": facts.vectors.shape[2]}
        super().__init__(splits, label_names=rows_by_name, provides=provides)
        self.facts = facts


def make_fact_table(words: Sequence[Words], word_vectors: Mapping[str, Tensor]) -> FactTable:
    """The table of facts with the given words; the ids are 0, 1, 2, ...

    The vector of a slot is the mean of the unit vectors of its words, minus the mean over all facts that fill the slot. An
    absent slot has a zero vector and weight 0; every other slot has weight 1 (Elhoseiny et al., 2017).

    Args:
        words: for each of the F facts the words of subject, predicate and object; "" for an absent slot.
        word_vectors: the vector [V] of each word; see `read_word_vectors`.

    Raises:
        UserError: there are no facts, a fact has no words, words have no vector (the message lists all of them), or the
            vectors differ in size.

    Examples:
        >>> vectors = {"three": torch.tensor([3.0, 0.0]), "seven": torch.tensor([0.0, 2.0])}
        >>> make_fact_table([("three", "", ""), ("seven", "", "")], vectors).targets.tolist()
        [[0.5, -0.5, 0.0, 0.0, 0.0, 0.0], [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]
    """
    if not words:
        raise UserError("there are no facts; give at least one subject")
    phrases = sorted({word for fact in words for word in fact if word})
    vectors_by_phrase = phrase_vectors(phrases, word_vectors)
    size = max((len(vector) for vector in vectors_by_phrase.values()), default=1)  # all have the same size
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
    """The index of the split that each fact is assigned to [F] int64; the sizes of the splits differ by at most one fact.

    Args:
        facts: the table of all facts.
        num_splits: at least 1, at most F.
        by: "random", or "semantic" for splits of facts with similar vectors. For "semantic", k-means clusters the vectors
            [F, 3 V]; then the pairs of a fact and a cluster centre are visited from the nearest to the farthest, and a fact is
            assigned to the first of its centres whose split is not full.
        seed: of the permutation, or of k-means.

    Raises:
        UserError: there are more splits than facts (for "semantic", than different vectors), the seed is negative, or the
            grouping is unknown.
    """
    if by not in get_args(Grouping):
        raise UserError(f"the grouping of facts must be 'random' or 'semantic', got '{by}'")
    check_at_least("seed", seed, 0)
    num_distinct = len(facts.targets.unique(dim=0)) if by == "semantic" else len(facts)
    if not 1 <= num_splits <= num_distinct:
        raise UserError(
            f"num_splits must lie between 1 and {num_distinct}, the number of different facts, got {num_splits}"
        )
    if by == "random":
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(facts)))
        return (torch.arange(len(facts)) % num_splits)[order.argsort()]
    from sklearn.cluster import KMeans

    targets = facts.targets.double().numpy()
    distances = KMeans(num_splits, n_init=10, random_state=seed % 2**32).fit(targets).transform(targets)
    return torch.from_numpy(_assign_to_nearest(distances))


def _assign_to_nearest(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Balanced groups [F] from the distances of facts to group centres [F, S]; the nearest pairs are assigned first."""
    num_facts, num_splits = distances.shape
    size, num_larger = divmod(num_facts, num_splits)  # num_larger groups have one fact more than the others
    groups, sizes = np.full(num_facts, -1), np.zeros(num_splits, dtype=int)
    for fact, split in zip(
        *np.unravel_index(distances.argsort(axis=None, kind="stable"), distances.shape), strict=True
    ):
        can_be_larger = sizes[split] == size and num_larger > 0
        if groups[fact] < 0 and (sizes[split] < size or can_be_larger):
            groups[fact] = split
            sizes[split] += 1
            num_larger -= can_be_larger
    return groups
