"""Distillation losses: distances between new embeddings and those of an older model. N samples, D embedding size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding_distillation(new: Tensor, old: Tensor) -> Tensor:
    """The mean squared distance `1/N sum_n ||new_n - old_n||_2^2` of embeddings [N, D] (Yu et al., CVPR 2020).

    Returns:
        A scalar >= 0, differentiable in both arguments.
    """
    return (new - old).square().sum(dim=1).mean()


def similarity_distillation(new: Tensor, old: Tensor) -> Tensor:
    """The mean squared difference of all cosines, `1/N^2 sum_nm (cos(new_n, new_m) - cos(old_n, old_m))^2`.

    A rotation of all new embeddings [N, D] does not change it (Tung and Mori, ICCV 2019).

    Returns:
        A scalar >= 0, differentiable in both arguments.
    """
    return (_cosine_matrix(new) - _cosine_matrix(old)).square().mean()


def _cosine_matrix(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    return unit @ unit.T
