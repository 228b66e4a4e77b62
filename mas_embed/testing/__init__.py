"""Tests of the contracts of components, for those of this package and of users."""

from mas_embed.testing.dataset import check_dataset
from mas_embed.testing.method import check_method, loss
from mas_embed.testing.model import check_model

__all__ = ["check_dataset", "check_method", "check_model", "loss"]
