"""Embeds the items of a part; processes that work together divide its batches among them."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.utils.data import Subset

from mas_embed.data import Part, ordered_batches
from mas_embed.retrieval import embed
from mas_embed.runtime.distributed import cat_over_processes, num_processes, process_rank, share_of


def embed_part(model: nn.Module, part: Part, *, batch_size: int, num_workers: int = 0) -> Tensor:
    """The embeddings [N, D] of the inputs of a part, not augmented, in order, on the CPU; see `embed`.

    In several processes that train together each embeds some of the batches, which are those of one process, and all get the
    embeddings of all.

    Args:
        model: that embeds.
        part: the items.
        batch_size: the number of items of a batch.
        num_workers: processes that load the items; 0 to load them in this one.
    """
    if num_processes() == 1:
        batches = ordered_batches(part, batch_size=batch_size, num_workers=num_workers)
        return embed(model, batches, num_items=len(part))
    rows = embed_own_share(model, part, batch_size=batch_size, num_workers=num_workers)
    return cat_over_processes(rows)


def own_items(num_items: int, batch_size: int) -> range:
    """The positions of the items that this process embeds: whole batches, which follow each other."""
    batches = share_of(math.ceil(num_items / batch_size), process_rank(), num_processes())
    return range(min(batches.start * batch_size, num_items), min(batches.stop * batch_size, num_items))


def embed_own_share(model: nn.Module, part: Part, *, batch_size: int, num_workers: int = 0) -> Tensor:
    """The embeddings of `own_items` of a part, [n, D]; n may be 0."""
    items = own_items(len(part), batch_size)
    embedded = items or range(1)  # for the size of the embeddings
    is_tensor = isinstance(part.inputs, Tensor)
    inputs = part.inputs[embedded.start : embedded.stop] if is_tensor else Subset(part, embedded)
    batches = ordered_batches(inputs, batch_size=batch_size, num_workers=num_workers)
    return embed(model, batches, num_items=len(embedded))[: len(items)]
