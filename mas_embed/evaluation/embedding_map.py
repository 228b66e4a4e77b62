"""A sample of gallery items and the means of their classes in the embedding space, when learned and now.

M items, C classes, D embedding size, d components that are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mas_embed.evaluation.learned_and_now import LearnedAndNow, as_arrays, as_tensors
from mas_embed.evaluation.recording import Array, EmbeddingMap

MOST_ITEMS = 300
MOST_CLASSES = 24
MOST_COMPONENTS = 32
SAMPLE_SEED = 1


class MapRecorder:
    """Records the embeddings of the same items at every evaluation.

    Args:
        unit_length: whether embeddings are scaled to unit length first, as they are where cosines are compared.
    """

    def __init__(self, *, unit_length: bool = False) -> None:
        self.unit_length = unit_length
        self._items: dict[str, Array] = {}
        self._classes: dict[str, Array] = {}
        self._rows, self._means = LearnedAndNow(), LearnedAndNow()

    def begin(self, gallery_labels: Sequence[Array], *, first_split: int = 0) -> None:
        """Draws classes, equally many of every split, and items of each, from the labels of the gallery of every split.

        Args:
            gallery_labels: of all splits.
            first_split: nothing is drawn of the splits before it, of which there may be items already.
        """
        per_split = max(1, MOST_CLASSES // len(gallery_labels))
        items: list[tuple[int, int, Array]] = []
        classes: list[tuple[int, int]] = []
        for split, labels in enumerate(gallery_labels[first_split:], first_split):
            generator = np.random.default_rng([SAMPLE_SEED, split])
            drawn = np.sort(generator.permutation(np.unique(labels))[:per_split])
            for label in drawn if len(classes) < MOST_CLASSES else ():
                of_class = generator.permutation(np.flatnonzero(labels == label))
                classes.append((split, label))
                items.append((split, label, of_class))
        share = (len(gallery_labels) - first_split) / len(gallery_labels)
        size = max(1, int(share * MOST_ITEMS) // max(len(classes), 1))
        rows = [(split, int(index), label) for split, label, at in items for index in np.sort(at[:size])]
        self._items = _appended(self._items, rows, ("split", "index", "label"))
        self._classes = _appended(self._classes, classes, ("split", "label"))

    def record(self, split_index: int, gallery: Tensor, labels: Sequence[Array]) -> None:
        """Records an evaluation of the first splits.

        Args:
            split_index: of the split that was learned last.
            gallery: [G, D] the embeddings of the galleries of these splits, one after another.
            labels: of the gallery of every split.
        """
        starts = np.cumsum([0, *map(len, labels)])
        items = self._items["split"] < len(labels)
        positions = starts[self._items["split"][items]] + self._items["index"][items]
        pairs = zip(self._classes["split"], self._classes["label"], strict=True)
        members = [
            starts[split] + np.flatnonzero(labels[split] == label) for split, label in pairs if split < len(labels)
        ]
        sizes = torch.tensor([len(of_class) for of_class in members])
        class_of_row = torch.arange(len(members)).repeat_interleave(sizes)
        rows = self._scaled(gallery[torch.from_numpy(np.concatenate([positions, *members]))])
        rows_of_items, rows_of_classes = rows[: len(positions)], rows[len(positions) :]
        sums = torch.zeros(len(members), rows.shape[1], dtype=torch.float64).index_add_(
            0, class_of_row, rows_of_classes
        )
        self._rows.update(self._items["split"], split_index, rows=rows_of_items.float().numpy())
        self._means.update(self._classes["split"], split_index, rows=(sums / sizes[:, None]).float().numpy())

    def as_map(self) -> EmbeddingMap | None:
        """The items and class means in coordinates along the principal components; None without two learned items."""
        if not self._rows.now:
            return None
        learned, now = self._rows.learned["rows"], self._rows.now["rows"]
        both = np.concatenate([learned, now]).astype(np.float64)
        both = both[~np.isnan(both).any(1)]
        if len(both) < 3:
            return None
        centre = both.mean(0)
        components, explained = _principal_components(both - centre)

        def coordinates(rows: Array) -> Array:
            return ((rows.astype(np.float64) - centre) @ components.T).astype(np.float32)

        return EmbeddingMap(
            **self._items,
            learned=coordinates(learned),
            now=coordinates(now),
            mean_label=self._classes["label"],
            mean_split=self._classes["split"],
            mean_learned=coordinates(self._means.learned["rows"]),
            mean_now=coordinates(self._means.now["rows"]),
            explained=explained,
        )

    def _scaled(self, rows: Tensor) -> Tensor:
        """The embeddings in float64, of unit length if that is what is compared."""
        return torch.nn.functional.normalize(rows.double()) if self.unit_length else rows.double()

    def state_dict(self) -> dict[str, Any]:
        """What was drawn, and what was recorded."""
        return {
            "items": as_tensors(self._items),
            "classes": as_tensors(self._classes),
            "rows": self._rows.state_dict(),
            "means": self._means.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._items, self._classes = as_arrays(state["items"]), as_arrays(state["classes"])
        self._rows.load_state_dict(state["rows"])
        self._means.load_state_dict(state["means"])


def _appended(columns: Mapping[str, Array], rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> dict[str, Array]:
    """Columns by name with further rows."""
    table = np.array(rows, np.int64).reshape(len(rows), len(names))
    new = {
        name: table[:, position].astype(np.int64 if name == "label" else np.int32)
        for position, name in enumerate(names)
    }
    return {name: np.concatenate([columns[name], values]) if columns else values for name, values in new.items()}


def _principal_components(centred: Array) -> tuple[Array, Array]:
    """The components [d, D] of centred rows [N, D], the largest first, and the shares [d] of the variance, float32.

    The sign of a component is such that its largest number is positive.
    """
    _, deviations, components = np.linalg.svd(centred, full_matrices=False)
    components = components[:MOST_COMPONENTS]
    largest = np.abs(components).argmax(1)
    signs = np.sign(components[np.arange(len(components)), largest])
    variances = deviations**2
    explained = variances / variances.sum() if variances.sum() > 0 else variances
    return components * signs[:, None], explained[:MOST_COMPONENTS].astype(np.float32)
