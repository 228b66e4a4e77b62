"""The loss of fact learning: how far an image's embedding is from the vectors of its fact.

N samples, F facts, V size of a word vector; slots are in the order subject, predicate, object.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.facts.table import FactTable
from mas_embed.losses import LOSSES

Form = Literal["distance", "squared"]


def fact_loss(embeddings: Tensor, vectors: Tensor, weights: Tensor, *, form: Form = "distance") -> Tensor:
    """The mean over samples of the weighted distances of the three slots, a scalar >= 0.

    With V_k the part of an embedding that belongs to slot k, L_k the fact's vector and w_k its weight:
    "distance" is `sum_k w_k ||V_k - L_k||`, as in the release of Aljundi et al. (2018) but without the 1e-6 that its
    library adds to every difference; "squared" is `sum_k w_k ||V_k - L_k||^2 / 2` (Elhoseiny et al., 2017, in Caffe).
    A slot of weight 0 has no part in value or gradient, whatever it holds. The gradient of a distance of 0 is 0.

    Args:
        embeddings: [N, 3 V], subject, predicate and object side by side.
        vectors: [N, 3, V], of each sample's fact.
        weights: [N, 3], >= 0, which is not checked; 0 for a wildcard.
        form: "distance" or "squared".

    Raises:
        UserError: shapes that do not fit, no samples, or an unknown form.

    Example:
        >>> embeddings = torch.tensor([[3.0, 4.0, 9.0, 9.0, 9.0, 9.0]])
        >>> fact_loss(embeddings, torch.zeros(1, 3, 2), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor(5.)
    """
    if form not in get_args(Form):
        raise UserError(f"the form of the fact loss must be 'distance' or 'squared', got '{form}'")
    if not _is_table(vectors, weights) or len(vectors) == 0 or embeddings.shape != vectors.flatten(1).shape:
        raise UserError(
            "the fact loss needs embeddings [N, 3 V], vectors [N, 3, V] and weights [N, 3] of at least one sample, got "
            f"{list(embeddings.shape)}, {list(vectors.shape)} and {list(weights.shape)}"
        )
    differences = embeddings.unflatten(1, vectors.shape[1:]) - vectors.to(embeddings.dtype)
    differences = differences.masked_fill((weights == 0)[:, :, None], 0)  # 0 times what is not finite would not be 0
    values = torch.linalg.vector_norm(differences, dim=2) if form == "distance" else differences.square().sum(2) / 2
    return (weights.to(embeddings.dtype) * values).sum(1).mean()


def _is_table(vectors: Tensor, weights: Tensor) -> bool:
    """Whether shapes are those of three slots."""
    return vectors.ndim == 3 and vectors.shape[1] == 3 and weights.shape == vectors.shape[:2]


class FactLoss(nn.Module):
    """`fact_loss` for embeddings and labels, where a label is a row of a table of facts.

    Args:
        vectors: [F, 3, V], of every fact.
        weights: [F, 3], of every fact, >= 0; 0 for a wildcard.
        form: "distance" or "squared".

    Raises:
        UserError: shapes that do not fit, a negative weight, or an unknown form.
    """

    vectors: Tensor
    weights: Tensor

    def __init__(self, vectors: Tensor, weights: Tensor, *, form: Form = "distance") -> None:
        super().__init__()
        if not _is_table(vectors, weights):
            shapes = f"{list(vectors.shape)} and {list(weights.shape)}"
            raise UserError(f"a table of facts has vectors [F, 3, V] and weights [F, 3], got {shapes}")
        if not bool((weights >= 0).all()):
            raise UserError("the weights of facts must be >= 0; give a wildcard the weight 0")
        if form not in get_args(Form):
            raise UserError(f"the form of the fact loss must be 'distance' or 'squared', got '{form}'")
        self.register_buffer("vectors", vectors)
        self.register_buffer("weights", weights)
        self.form: Form = form

    def forward(self, embeddings: Tensor, labels: Tensor, mined: Any = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: [N, 3 V].
            labels: [N] int64, rows of the table.
            mined: has no use here; a training step passes what its miner found.

        Raises:
            UserError: labels that are no int64, or no rows of the table. Rows are checked on the CPU alone, as a check would
                have to wait for another device; there, numbers beyond the table fail, and negative ones count from its end.
        """
        if labels.dtype != torch.long:
            raise UserError(f"labels of facts must be int64, got {labels.dtype}")
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < len(self.vectors))).all()):
            raise UserError(
                f"labels must be rows of the table of {len(self.vectors)} facts, got {labels.min()} to {labels.max()}"
            )
        return fact_loss(embeddings, self.vectors[labels], self.weights[labels], form=self.form)


@LOSSES.register("facts")
def fact_table_loss(facts: FactTable, *, form: Form = "distance") -> FactLoss:
    """The `FactLoss` of a table of facts.

    Args:
        facts: the table, which the data set provides.
        form: "distance" or "squared".
    """
    return FactLoss(facts.vectors, facts.weights, form=form)
