"""How far new embeddings are from those of an older model. N samples, D embedding size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding_distillation(new: Tensor, old: Tensor) -> Tensor:
    """`1/N sum_n ||new_n - old_n||_2^2`, a scalar >= 0, of embeddings [N, D] (Yu et al., CVPR 2020)."""
    return (new - old).square().sum(dim=1).mean()


def similarity_distillation(new: Tensor, old: Tensor) -> Tensor:
    """`1/N^2 sum_nm (cos(new_n, new_m) - cos(old_n, old_m))^2`, a scalar >= 0 (Tung and Mori, ICCV 2019).

    Embeddings [N, D] may turn as a whole without a loss.
    """
    return (_cosines(new) - _cosines(old)).square().mean()


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    return unit @ unit.T
