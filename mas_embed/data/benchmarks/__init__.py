"""The benchmarks of image retrieval in the layouts in which their authors publish them."""

from mas_embed.data.benchmarks.birds_and_cars import cars196, cub200
from mas_embed.data.benchmarks.flowers import flowers102
from mas_embed.data.benchmarks.grocery import grocery
from mas_embed.data.benchmarks.products import in_shop, stanford_online_products

__all__ = ["cars196", "cub200", "flowers102", "grocery", "in_shop", "stanford_online_products"]
