"""Data sets that are divided into sequences of splits, by name in `DATASETS`."""

from mas_embed.data.batches import ordered_batches
from mas_embed.data.benchmarks import cars196, cub200, flowers102, grocery, in_shop, stanford_online_products
from mas_embed.data.digits import digits
from mas_embed.data.fingerprint import fingerprint_of_inputs, fingerprint_of_split, fingerprints_of_parts
from mas_embed.data.image_folders import image_folder, image_folders
from mas_embed.data.image_manifest import image_manifest
from mas_embed.data.image_preprocessing import ImagePreprocessing
from mas_embed.data.images import ImageFiles
from mas_embed.data.learned import LearnedSplits, num_classes
from mas_embed.data.partition import HeldOut, check_held_out, partition
from mas_embed.data.pictures import picture_of, thumbnail_of
from mas_embed.data.split import (
    DATASETS,
    FIRST_FREE_ID,
    Part,
    Split,
    SplitSequence,
    check_splits,
    empty_part,
    join_parts,
    join_splits,
    missing_split,
)
from mas_embed.data.subset import PartName, Subset, select_subset
from mas_embed.data.text_manifest import text_manifest
from mas_embed.data.torchvision_sets import torchvision_images
from mas_embed.data.transforms import (
    TRANSFORMS,
    AugmentedImages,
    Normalize,
    NormalizedImages,
    image_shape,
    transform_splits,
)
from mas_embed.data.unlabeled_images import unlabeled_images

__all__ = [
    "DATASETS",
    "FIRST_FREE_ID",
    "TRANSFORMS",
    "AugmentedImages",
    "HeldOut",
    "ImageFiles",
    "ImagePreprocessing",
    "LearnedSplits",
    "Normalize",
    "NormalizedImages",
    "Part",
    "PartName",
    "Split",
    "SplitSequence",
    "Subset",
    "cars196",
    "check_held_out",
    "check_splits",
    "cub200",
    "digits",
    "empty_part",
    "fingerprint_of_inputs",
    "fingerprint_of_split",
    "fingerprints_of_parts",
    "flowers102",
    "grocery",
    "image_folder",
    "image_folders",
    "image_manifest",
    "image_shape",
    "in_shop",
    "join_parts",
    "join_splits",
    "missing_split",
    "num_classes",
    "ordered_batches",
    "partition",
    "picture_of",
    "select_subset",
    "stanford_online_products",
    "text_manifest",
    "thumbnail_of",
    "torchvision_images",
    "transform_splits",
    "unlabeled_images",
]
