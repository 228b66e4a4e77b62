"""Data sets as sequences of splits, by name in `DATASETS`."""

from mas_embed.data.digits import DATASETS, digits
from mas_embed.data.fact_digits import fact_digits
from mas_embed.data.fact_list import read_fact_list
from mas_embed.data.fact_release import read_fact_release
from mas_embed.data.facts import FactSequence, FactTable, deal_facts, make_fact_table
from mas_embed.data.image_sets import image_folders, torchvision_images
from mas_embed.data.images import ImageFiles
from mas_embed.data.split import Part, Split, join_parts, join_splits
from mas_embed.data.subset import PartName, Subset, select_subset
from mas_embed.data.word_vectors import read_word_vectors

__all__ = [
    "DATASETS",
    "FactSequence",
    "FactTable",
    "ImageFiles",
    "Part",
    "PartName",
    "Split",
    "Subset",
    "deal_facts",
    "digits",
    "fact_digits",
    "image_folders",
    "join_parts",
    "join_splits",
    "make_fact_table",
    "read_fact_list",
    "read_fact_release",
    "read_word_vectors",
    "select_subset",
    "torchvision_images",
]
