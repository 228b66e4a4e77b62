"""The loss of fact learning: the distance of an image's embedding from the vectors of its fact.

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
    """The weighted distances of the three slots, summed over slots and averaged over samples; a scalar >= 0.

    For a sample, let V_k be the part of its embedding for slot k, L_k the vector of its fact in slot k, and w_k the weight.
    Then "distance" is `sum_k w_k ||V_k - L_k||`, as in the release of Aljundi et al. (2018), but without the 1e-6 that its
    library adds to every difference; "squared" is `sum_k w_k ||V_k - L_k||^2 / 2` (Elhoseiny et al., 2017, in Caffe).
    A slot of weight 0 contributes nothing to the value or the gradient, even if it holds NaN. At distance 0 the gradient is 0.

    Args:
        embeddings: [N, 3 V], subject, predicate and object side by side.
        vectors: [N, 3, V], those of each sample's fact.
        weights: [N, 3], those of each sample's fact, 0 for a wildcard. They must be >= 0, which is not checked.
        form: "distance" or "squared".

    Raises:
        UserError: the shapes do not fit together, there are no samples, or the form is unknown.

    Examples:
        >>> embeddings = torch.tensor([[3.0, 4.0, 9.0, 9.0, 9.0, 9.0]])
        >>> fact_loss(embeddings, torch.zeros(1, 3, 2), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor(5.)
    """
    _check_form(form)
    if not _have_three_slots(vectors, weights) or len(vectors) == 0 or embeddings.shape != vectors.flatten(1).shape:
        raise UserError(
            "the fact loss needs embeddings [N, 3 V], vectors [N, 3, V] and weights [N, 3] of at least one sample, got "
            f"{list(embeddings.shape)}, {list(vectors.shape)} and {list(weights.shape)}"
        )
    differences = embeddings.unflatten(1, vectors.shape[1:]) - vectors.to(embeddings.dtype)
    differences = differences.masked_fill((weights == 0)[:, :, None], 0)  # 0 times infinity or NaN would not be 0
    values = torch.linalg.vector_norm(differences, dim=2) if form == "distance" else differences.square().sum(2) / 2
    return (weights.to(embeddings.dtype) * values).sum(1).mean()


class FactLoss(nn.Module):
    """The `fact_loss` of embeddings and labels, where a label is the row of a fact in a table.

    Args:
        vectors: [F, 3, V], of every fact.
        weights: [F, 3], of every fact, >= 0; 0 for a wildcard.
        form: "distance" or "squared".

    Raises:
        UserError: the shapes do not fit together, a weight is negative, or the form is unknown.
    """

    vectors: Tensor
    weights: Tensor

    def __init__(self, vectors: Tensor, weights: Tensor, *, form: Form = "distance") -> None:
        super().__init__()
        if not _have_three_slots(vectors, weights):
            shapes = f"{list(vectors.shape)} and {list(weights.shape)}"
            raise UserError(f"a table of facts has vectors [F, 3, V] and weights [F, 3], got {shapes}")
        if not bool((weights >= 0).all()):
            raise UserError("the weights of facts must be >= 0; give a wildcard the weight 0")
        _check_form(form)
        self.register_buffer("vectors", vectors)
        self.register_buffer("weights", weights)
        self.form: Form = form

    def forward(self, embeddings: Tensor, labels: Tensor, mined: Any = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: [N, 3 V].
            labels: [N] int64, rows of the table.
            mined: the output of a miner, which every training loss is called with; this loss does not use it.

        Raises:
            UserError: the labels are not int64, or not rows of the table. The rows are checked on the CPU only, because the
                check would wait for any other device. There, labels beyond the table raise an indexing error, and negative
                labels count from the end of the table.
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
    """The `FactLoss` for the facts of a table.

    Args:
        facts: the table, which the data set provides.
        form: "distance" or "squared".
    """
    return FactLoss(facts.vectors, facts.weights, form=form)


def _have_three_slots(vectors: Tensor, weights: Tensor) -> bool:
    """Whether the shapes are [N, 3, V] and [N, 3]."""
    return vectors.ndim == 3 and vectors.shape[1] == 3 and weights.shape == vectors.shape[:2]


def _check_form(form: str) -> None:
    if form not in get_args(Form):
        raise UserError(f"the form of the fact loss must be 'distance' or 'squared', got '{form}'")
