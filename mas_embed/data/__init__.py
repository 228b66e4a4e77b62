"""Data sets as sequences of splits, by name in `DATASETS`."""

from mas_embed.data.digits import DATASETS, digits
from mas_embed.data.split import Part, Split, join_parts, join_splits

__all__ = ["DATASETS", "Part", "Split", "digits", "join_parts", "join_splits"]
