"""The empirical Fisher information of a training loss over embeddings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance, estimate_importance
from mas_embed.methods.base import Loss
from mas_embed.methods.checks import inputs_and_labels
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.forward import Embed, batch_to, device_of, embed_batch
from mas_embed.runtime.modes import eval_mode

Fisher = Literal["sample", "batch"]


def estimate_fisher(
    model: nn.Module, batches: Iterable[Any], *, loss: Loss, fisher: Fisher = "sample", embed: Embed | str | None = None
) -> Importance:
    """The mean squared gradient of the training loss: `F_p = 1/N sum_n (d l_n / d theta_p)^2`, by parameter name.

    The Fisher information is defined for a loss that is the mean of losses l_n of single samples, each a negative
    log-likelihood. A loss L over pairs or triplets is defined on a whole batch instead. Its gradient is still a sum over
    samples, with one term that passes through the embedding z_n of each: `dL/dtheta = sum_n dL/dz_n . dz_n/dtheta`. With
    `fisher="sample"`, the gradient of sample n in a batch of B samples is its term times B. For a mean of losses of single
    samples, this is exactly `d l_n / d theta`.

    The estimate deviates from the definition in four respects. For a loss over pairs, the gradient of a sample depends on the
    other samples of its batch, so batches should be drawn as in training. The labels are the true ones and are not drawn from
    the model (the "empirical" Fisher information). No miner selects pairs. The model is in eval mode.

    With `fisher="batch"`, the gradient of a whole batch is squared, `1/N sum_b B_b (dL_b / d theta_p)^2`, as many
    implementations do. Gradients of opposite signs cancel within a batch, and the result shrinks with the batch size.

    A loss with a margin may have no gradient left when a split ends; use another, smooth loss in that case.

    Args:
        model: any module that embeds a batch as [N, D].
        batches: pairs `(inputs, labels)`, with several classes in every batch.
        loss: the training loss, called as `loss(embeddings [B, D], labels [B], None)`, with None for the miner's result, which is
            left out for a loss that takes two arguments, such as `torch.nn.CrossEntropyLoss`.
        fisher: "sample" or "batch".
        embed: replaces `model(input)`, see `estimate_importance`.

    Returns:
        The mean squared gradients, values >= 0, as importance by parameter name.

    Raises:
        UserError: a batch has no labels, or `estimate_importance` refuses the model or the batches.

    Warns:
        UserWarning: the Fisher information is zero everywhere.

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
    if not bool(torch.stack([value.any() for value in information.values()]).any()):
        warnings.warn(
            f"the loss has no gradient on any {fisher}, so its Fisher information is zero and protects nothing; use a loss "
            "that does not reach zero, such as MultiSimilarityLoss",
            stacklevel=2,
        )
    return information


def share_of_loss(embeddings: Tensor, batch: Any) -> Tensor:
    """`z_n . dL/dz_n` for every sample, [N], where dL/dz_n is a constant; its gradient is the term of sample n in dL/dtheta."""
    return (embeddings * batch[1]).sum(dim=1)


def check_loss(loss: Loss | None, method: str) -> None:
    """Raises `UserError` unless the loss is a callable without trainable parameters.

    Every split trains its own copy of a loss with parameters, which no longer exists when the method consolidates.
    """
    if not callable(loss):
        raise UserError(
            f"{method} takes the gradient of the training loss; pass loss=(embeddings, labels, mined) -> tensor"
        )
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError(
            f"{method} takes the gradient of the training loss, but {type(loss).__name__} has parameters that are trained "
            "anew in every split; take a loss without parameters"
        )
    if not (_accepts(loss, 3) or _accepts(loss, 2)):
        raise UserError(
            f"{method} calls the loss as loss(embeddings, labels, mined) or loss(embeddings, labels), which "
            f"{getattr(loss, '__name__', type(loss).__name__)} does not accept"
        )


def _accepts(loss: Loss, num_arguments: int) -> bool:
    """Whether a loss can be called with that many arguments; assumed of a callable that does not tell its signature."""
    try:
        inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(*[None] * num_arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _with_loss_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss, fisher: Fisher, embed: Embed | str | None
) -> Iterator[tuple[Any, Tensor]]:
    """The inputs of every batch with the scaled gradient [B, D] of its loss with respect to its embeddings.

    The loss is computed here because it needs the whole batch, while `estimate_importance` processes every sample alone.
    """
    mined = (None,) if _accepts(loss, 3) else ()
    for batch in batches:
        inputs, labels = inputs_and_labels(
            batch_to(batch, device_of(model)), "the method takes the gradient of the training loss"
        )
        with torch.no_grad(), eval_mode(model):
            embeddings = embed_batch(model, (inputs, labels), embed)
        with torch.enable_grad():
            embeddings.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(embeddings, labels, *mined), embeddings)
        # The loss is a mean over B samples. "sample": times B gives the gradients of the losses of single samples. "batch":
        # times sqrt(B), a batch counts as B samples after squaring
        yield inputs, gradient * (len(gradient) if fisher == "sample" else len(gradient) ** 0.5)
