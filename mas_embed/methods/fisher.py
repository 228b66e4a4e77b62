"""The empirical Fisher information of a training loss over embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance, estimate_importance
from mas_embed.methods.base import Loss
from mas_embed.methods.checks import check_choice, inputs_and_labels
from mas_embed.runtime.forward import Embed, batch_to, device_of, embed_batch
from mas_embed.runtime.modes import eval_mode

Fisher = Literal["sample", "batch"]


def estimate_fisher(
    model: nn.Module, batches: Iterable[Any], *, loss: Loss, fisher: Fisher = "sample", embed: Embed | str | None = None
) -> Importance:
    """The mean squared gradient of the training loss: `F_p = 1/N sum_n (d l_n / d theta_p)^2`, by parameter name.

    The Fisher information is defined for a loss that is a mean of losses l_n of single samples, minus log-likelihoods. A loss
    over pairs or triplets, L, is one of a whole batch. Its gradient is a sum all the same, with a term that goes through each
    sample's embedding z_n: `dL/dtheta = sum_n dL/dz_n . dz_n/dtheta`. With `fisher="sample"` the gradient of sample n in a
    batch of B is its term times B, which for a mean of losses of single samples is `d l_n / d theta` exactly. What deviates:
    for a loss over pairs it depends on the rest of the batch, so batches should be drawn as they are in training; the
    labels are the true ones, not drawn from the model (the "empirical" Fisher); no miner chooses pairs; and the model is in
    eval mode. A loss with a margin may have no gradient left when a split ends: take the information of another, smooth one.
    `fisher="batch"` squares the gradient of a whole batch, `1/N sum_b B_b (dL_b / d theta_p)^2`, as the common
    ports do; opposite samples cancel in it and it falls with the batch size.

    Args:
        model: any module that embeds a batch as [N, D].
        batches: `(inputs, labels)` each, with several classes in every batch.
        loss: the training loss, called as `loss(embeddings [B, D], labels [B], None)`; None is where a miner's result goes.
        fisher: "sample" or "batch".
        embed: how to embed instead of `model(input)`.

    Returns:
        The squared gradients, values >= 0, as importance by parameter name.

    Raises:
        UserError: a batch has no labels, or what `estimate_importance` refuses.

    Warns:
        UserWarning: the information is zero everywhere.

    Source: Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, PNAS 2017. "batch" weights batches by
        their size, as FACIL does (Masana et al., 2022).
    """
    check_choice("fisher", fisher, get_args(Fisher))
    information = estimate_importance(
        model,
        _with_loss_gradients(model, batches, loss, fisher, embed),
        output=share_of_loss,
        granularity=fisher,
        exponent=2,
        embed=embed,
    )
    if not any(bool(value.any()) for value in information.values()):
        warnings.warn(
            f"the loss has no gradient on any {fisher}, so its Fisher information is zero and protects nothing; take it of a "
            "loss that does not reach zero, such as MultiSimilarityLoss",
            stacklevel=2,
        )
    return information


def share_of_loss(embeddings: Tensor, batch: Any) -> Tensor:
    """`z_n . dL/dz_n` with the second factor fixed: its gradient is what sample n adds to the gradient of the loss. [N]."""
    return (embeddings * batch[1]).sum(dim=1)


def check_loss(loss: Loss | None, method: str) -> None:
    """Raises `UserError` for a loss that has no value of its own when a split ends: none, or one with parameters."""
    if not callable(loss):
        raise UserError(
            f"{method} takes the gradient of the training loss; pass loss=(embeddings, labels, mined) -> tensor"
        )
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError(
            f"{method} takes the gradient of the training loss, but {type(loss).__name__} has parameters that are trained "
            "anew in every split; take a loss without parameters"
        )


def _with_loss_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss, fisher: Fisher, embed: Embed | str | None
) -> Iterator[tuple[Any, Tensor]]:
    """Every batch's inputs, and beside them the gradient [B, D] of its loss with respect to its embeddings, scaled.

    The loss is taken here, of the whole batch, because importance looks at samples one by one.
    """
    for batch in batches:
        inputs, labels = inputs_and_labels(
            batch_to(batch, device_of(model)), "the method takes the gradient of the training loss"
        )
        with torch.no_grad(), eval_mode(model):
            embeddings = embed_batch(model, (inputs, labels), embed)
        with torch.enable_grad():
            embeddings.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(embeddings, labels, None), embeddings)
        # A mean over B: times B it is the samples' own, and times sqrt(B), squared, a batch counts as B samples
        yield inputs, gradient * (len(gradient) if fisher == "sample" else len(gradient) ** 0.5)
