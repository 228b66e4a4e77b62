"""`estimate_importance` adds up the importance of every parameter over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import (
    check_arguments,
    check_embeddings,
    check_norm_can_change,
    check_num_samples,
    check_sums_are_finite,
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
    """Estimates parameter importance, `Omega_p = 1/N sum_n |d output(x_n) / d theta_p|^exponent`, from unlabeled inputs.

    The gradients are taken per sample, in eval mode, and are exact. Rules derive them from one ordinary backward pass of the
    batch for linear layers, convolutions, normalization, embeddings, PReLU, attention and other parameters in matrix products;
    for all others they are computed with `torch.func`. `explain_coverage` lists which parameters use which. The result depends
    neither on the batch size nor on the order of the samples. The model is unchanged afterwards: mode, buffers, `.grad`,
    `requires_grad`, hooks and random state.

    On a GPU, torch lets convolutions compute in TF32 by default, and the gradients have its rounding errors (up to 4 % in an
    untrained ResNet-18). With `torch.backends.cudnn.allow_tf32 = False` they are those of float32.

    Use "squared_norm" for embeddings whose norm varies. If the network normalizes its embeddings at the end, use the squared
    norm of the embeddings before that (through `embed`), or "projection" where they are not available. "vector" takes D
    backward passes per batch and protects every unit of the output.

    In a `torch.distributed` group every process must call this function with a share of the samples; sums and counts are
    added over processes, and all of them get the same result.

    Args:
        model: a module that embeds a batch as [N, D]. Parameters with `requires_grad=False` are left out.
        batches: an iterable of batches. A batch is a tensor, a list of texts, a mapping, or a tuple or list whose first
            element is one of these (the labels are ignored). The first dimension of every tensor is the samples. Batches are
            moved to the model's device.
        output: the scalar of a sample whose gradient is taken. "squared_norm" is the paper's `||F(x)||^2`; "vector" is its
            vector variant, `sum_c |dF_c|`, in D backward passes; "projection" is the mean over 8 random unit directions v of
            `|d<v, z(x)>|`, where z is the embedding scaled to unit length, for embeddings that are compared by cosine
            similarity. A callable `(embeddings [N, D], batch) -> Tensor [N]` is accepted, too.
        granularity: "sample" is the definition above. "batch" takes `|sum over a batch|` instead, still divided by N:
            gradients of opposite sign cancel and the result depends on the batch size. Use it only to reproduce published
            numbers.
        exponent: 1 for MAS, 2 for the squared gradient (as in the empirical Fisher information).
        embed: replaces `model(input)`: a callable `(model, input) -> Tensor [N, D]`, which gets the input without the labels;
            the name of a method of the model; or, for text models, "sentence_transformers",
            "sentence_transformers_unnormalized", "mean_pooling" or "cls_pooling".
        progress: whether to show a progress bar.

    Returns:
        The importance by parameter name, with values >= 0. It is zero for parameters that the embeddings do not depend on.

    Raises:
        UserError: there are no batches or no trainable parameters; the embeddings are not [N, D], are not finite, have unit
            norm under "squared_norm", or depend on the other samples of their batch; or the model raises an error for a batch.

    Source: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, *Memory Aware Synapses*, ECCV 2018. The output "projection" is
        an addition of this project.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> opposite = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # F = 3, -1; gradients 2 F x = (6, 6), (-2, 2)
        >>> estimate_importance(model, [opposite])["weight"]
        tensor([[4., 4.]])
    """
    model, prefix = unwrap_compiled(model)
    check_arguments(model, batches, granularity, exponent)
    device, resolved, num_batches = device_of(model), resolve_output(output), 0
    settings = estimation_settings(resolved.name, granularity, exponent, embed)
    accumulator_class = BatchImportance if granularity == "sample" else _BatchGradients
    with eval_mode_with_grad(model):
        accumulator = accumulator_class(model, output=resolved, exponent=exponent, embed=embed)
        for batch in with_progress(batches, "importance" if progress else None):
            try:
                accumulator.add(batch_to(batch, device))
            except UserError as error:
                raise UserError(f"batch {num_batches}: {error}") from error.__cause__
            num_batches += 1
    num_samples = sum_over_processes(accumulator.sums, accumulator.num_samples)
    check_num_samples(num_samples)
    importance = Importance(accumulator.sums, num_samples, settings, fingerprint_of(model))
    check_sums_are_finite(accumulator.sums)
    if isinstance(resolved, SquaredNorm) and accumulator.norms:
        check_norm_can_change(torch.cat(accumulator.norms), importance, model)
    return importance.renamed(prefix)


class _BatchGradients:
    """Adds up `|sum over the batch of g_n|^exponent` over batches, which is what most libraries call MAS."""

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._model, self._output, self._exponent, self._embed = model, output, exponent, embed
        self._trainable = trainable_parameters(model)
        self.sums = zero_sums(self._trainable)
        self.norms: list[Tensor] = []
        self.num_samples = 0

    def add(self, batch: Any) -> None:
        embeddings = embed_batch(self._model, batch, self._embed)
        check_embeddings(embeddings, self._output)
        self.norms.append(embeddings.detach().norm(dim=1))
        values = self._output.values(embeddings, batch)
        scale = 1 / values.shape[1] if self._output.reduction == "mean" else 1.0
        for total in values.sum(0):
            gradients = torch.autograd.grad(total, list(self._trainable.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(self._trainable, gradients, strict=True):
                if gradient is not None:
                    self.sums[name].add_(gradient.to(self.sums[name].dtype).abs().pow_(self._exponent), alpha=scale)
        self.num_samples += len(values)


def estimation_settings(output: str, granularity: str, exponent: int, embed: Embed | str | None) -> dict[str, Any]:
    """The settings of an estimate, as `Importance.settings` stores them."""
    name = getattr(embed, "__qualname__", type(embed).__name__) if callable(embed) else embed
    return {"output": output, "granularity": granularity, "exponent": exponent, "embed": name}
