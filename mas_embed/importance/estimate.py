"""`estimate_importance`: the loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import (
    check_arguments,
    check_embeddings,
    check_finite,
    check_length_varies,
    check_num_samples,
)
from mas_embed.importance.engine import BatchImportance
from mas_embed.importance.outputs import Output, SquaredNorm, resolve_output
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.record import Importance
from mas_embed.runtime.distributed import sum_over_processes
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import Embed, batch_to, device_of, embed_batch, unwrap_compiled
from mas_embed.runtime.modes import eval_mode_with_grad
from mas_embed.runtime.progress import with_progress


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    output: str | Output | Callable[[Tensor, Any], Tensor] = "squared_norm",
    granularity: Literal["sample", "batch"] = "sample",
    exponent: Literal[1, 2] = 1,
    embed: Embed | str | None = None,
    progress: bool = False,
) -> Importance:
    """How much each parameter matters: `Omega_p = 1/N sum_n |d output(x_n) / d theta_p|^exponent`.

    Taken in eval mode, per sample, from unlabeled inputs, and exact: layers with a rule (linear, convolutions,
    normalisations, look-up tables, PReLU) take their per-sample gradients from one ordinary backward pass of the batch;
    every other parameter takes `torch.func` per-sample gradients; `explain_coverage` tells which. The result does not
    depend on the batch size or the order of the samples. The model is left as it was: mode, buffers, `.grad`,
    `requires_grad`, hooks and random state.

    Which output to take: "squared_norm" where embeddings have their own length; where a network normalises them at the end,
    the squared norm before that (`embed`), or "projection" where that cannot be had. "vector" needs D backward passes and
    protects each unit of the output.

    In a `torch.distributed` group every process must call it with its own share of the samples; sums and counts are added up,
    and all processes get the same result.

    Args:
        model: any module that embeds a batch as [N, D]. Parameters with `requires_grad=False` are left out.
        batches: an iterable of batches: a tensor; a tuple or list whose first element is the input (labels are
            ignored); a mapping. Samples come first in every tensor. Batches are moved to the model's device.
        output: the scalar of a sample whose sensitivity is measured. "squared_norm" is the paper's `||F(x)||^2`;
            "vector" its vector variant, `sum_c |dF_c|`, in D backward passes; "projection" the mean over 8 random unit
            directions v of `|d<v, z(x)>|`, z the embedding at unit length, for embeddings that are compared by cosine;
            or a callable `(embeddings [N, D], batch) -> Tensor [N]`.
        granularity: "sample" is the definition. "batch" takes `|sum over a batch|` instead, still divided by N:
            opposite samples cancel and the result depends on the batch size; only for reproducing published numbers.
        exponent: 1 for MAS, 2 for the (empirical Fisher) squared gradient.
        embed: how to embed instead of `model(input)`: `(model, batch) -> Tensor [N, D]`, or the name of a method of the
            model.
        progress: show a progress bar.

    Returns:
        The importance by parameter name, values >= 0; zero for a parameter that the embeddings do not depend on.

    Raises:
        UserError: no batches; no trainable parameter; embeddings that are not [N, D], not finite, of unit length under
            "squared_norm", or that depend on the other samples of their batch.

    Source: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, *Memory Aware Synapses*, ECCV 2018. "projection" is this
        project's.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> opposite = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # F is 3 and -1, its gradients 2 F x (6, 6) and (-2, 2)
        >>> estimate_importance(model, [opposite])["weight"]
        tensor([[4., 4.]])
    """
    model, prefix = unwrap_compiled(model)
    check_arguments(model, batches, granularity, exponent)
    device, resolved, num_batches = device_of(model), resolve_output(output), 0
    settings = describe(resolved.name, granularity, exponent, embed)
    accumulate = BatchImportance if granularity == "sample" else _BatchGradients
    with eval_mode_with_grad(model):
        accumulator = accumulate(model, output=resolved, exponent=exponent, embed=embed)
        for batch in with_progress(batches, "importance" if progress else None):
            try:
                accumulator.add(batch_to(batch, device))
            except UserError as error:
                raise UserError(f"batch {num_batches}: {error}") from None
            num_batches += 1
    num_samples = sum_over_processes(accumulator.sums, accumulator.num_samples)
    check_num_samples(num_samples)
    importance = Importance(accumulator.sums, num_samples, settings, fingerprint_of(model))
    check_finite(accumulator.sums)
    if isinstance(resolved, SquaredNorm) and accumulator.lengths:
        check_length_varies(torch.cat(accumulator.lengths), importance, model)
    return importance.renamed(prefix)


class _BatchGradients:
    """`|sum over the batch of g_n|^exponent`, summed over batches: what most libraries call MAS."""

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._model, self._output, self._exponent, self._embed = model, output, exponent, embed
        self._trainable = trainable_parameters(model)
        self.sums = zero_sums(self._trainable)
        self.lengths: list[Tensor] = []
        self.num_samples = 0

    def add(self, batch: Any) -> None:
        embeddings = embed_batch(self._model, batch, self._embed)
        check_embeddings(embeddings, self._output)
        self.lengths.append(embeddings.detach().norm(dim=1))
        values = self._output.values(embeddings, batch)
        scale = 1 / values.shape[1] if self._output.reduction == "mean" else 1.0
        for total in values.sum(0):
            gradients = torch.autograd.grad(total, list(self._trainable.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(self._trainable, gradients, strict=True):
                if gradient is not None:
                    self.sums[name].add_(gradient.to(self.sums[name].dtype).abs().pow_(self._exponent), alpha=scale)
        self.num_samples += len(values)


def describe(output: str, granularity: str, exponent: int, embed: Embed | str | None) -> dict[str, Any]:
    """The settings of an `Importance`."""
    name = getattr(embed, "__qualname__", type(embed).__name__) if callable(embed) else embed
    return {"output": output, "granularity": granularity, "exponent": exponent, "embed": name}
