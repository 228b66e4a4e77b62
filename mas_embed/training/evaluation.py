"""What a model knows of every split: queries of each against one gallery of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mas_embed.data import Part, Split
from mas_embed.errors import UserError
from mas_embed.retrieval import Distance, embed, evaluate_retrieval
from mas_embed.training.loading import ordered_batches


def check_splits(splits: Sequence[Split]) -> None:
    """Refuses a sequence that cannot be trained or judged.

    Raises:
        UserError: no splits, two of one name, an empty part, or a query whose class the gallery of all splits lacks.
    """
    if not splits:
        raise UserError("a sequence needs at least one split")
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise UserError(f"every split needs a name of its own, got {names}")
    for split in splits:
        for part_name in ("train", "query", "gallery"):
            if len(getattr(split, part_name)) == 0:
                raise UserError(f"split '{split.name}' has an empty {part_name} part")
    labels = torch.cat([split.gallery.labels for split in splits])
    ids = torch.cat([split.gallery.ids for split in splits])
    for split in splits:
        for label in split.query.labels.unique():
            own = split.query.ids[split.query.labels == label]
            in_gallery = ids[labels == label]
            # A class is asked for in vain if its queries find nothing, or nothing but themselves
            if len(in_gallery) == 0 or (len(in_gallery) == 1 and bool((own == in_gallery).any())):
                raise UserError(
                    f"split '{split.name}' has queries of class {int(label)}, but no gallery has another image of that class"
                )


def evaluate_splits(
    model: nn.Module, splits: Sequence[Split], *, distance: Distance, recall_at: Sequence[int], batch_size: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Ranks the gallery of all splits for the queries of each.

    Returns:
        By metric the scores [S] of the splits; and by metric the mean over the queries of all splits together.
    """
    galleries = [_embed_part(model, split.gallery, batch_size) for split in splits]
    gallery = torch.cat(galleries)
    gallery_labels = torch.cat([split.gallery.labels for split in splits])
    gallery_ids = torch.cat([split.gallery.ids for split in splits])
    by_split = []
    for split, own_gallery in zip(splits, galleries, strict=True):
        queries = own_gallery if split.query is split.gallery else _embed_part(model, split.query, batch_size)
        scores = evaluate_retrieval(
            queries,
            split.query.labels,
            gallery,
            gallery_labels,
            query_ids=split.query.ids,
            gallery_ids=gallery_ids,
            distance=distance,
            recall_at=recall_at,
        )
        by_split.append(scores)
    num_scored = [scores.num_queries - scores.num_skipped for scores in by_split]
    by_metric = {name: [scores.as_dict()[name] for scores in by_split] for name in by_split[0].as_dict()}
    over_all = {name: float(np.average(values, weights=num_scored)) for name, values in by_metric.items()}
    return by_metric, over_all


def _embed_part(model: nn.Module, part: Part, batch_size: int) -> torch.Tensor:
    return embed(model, ordered_batches(part, batch_size=batch_size))
