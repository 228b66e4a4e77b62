"""Exact per-sample gradients of parameters without a rule: `vmap(grad)` over chunks, or a loop if `vmap` fails on the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mas_embed.importance.outputs import Output
from mas_embed.importance.parameters import zero_sums
from mas_embed.importance.rules.memory import absolute_power
from mas_embed.importance.samples import has_only_rows, split_samples, take_samples
from mas_embed.runtime.forward import Embed, embed_batch

CHUNK_BYTES = 256 * 2**20


class PerSampleGradients:
    """Computes `sum_n |g_n|^exponent` over a batch, for given parameters, by differentiating every sample separately.

    Remembers whether `torch.func.vmap` can trace the model; once it has failed, the samples are differentiated in a loop.
    """

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._embedder = _Embedder(model, output, embed)
        self._exponent = exponent
        modules = [module for _, module in model.named_modules(remove_duplicate=False)]
        # torch swaps the parameters of a module that has two names twice, and does not restore them
        self.is_vectorized = len(set(modules)) == len(modules)

    def sums(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        num_samples: int,
        output_index: int,
        batch_gradient: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """The sums over samples for one output, by parameter name, in the parameters' shapes and in float32 or wider.

        Args:
            parameters: the parameters to differentiate with respect to, by name.
            batch: its tensors of first dimension `num_samples` are split into samples; all samples share everything else.
            num_samples: N.
            output_index: the index of the scalar to differentiate, of the K scalars per sample.
            batch_gradient: the gradient of the output summed over the batch; the per-sample gradients must add up to it.
        """
        if num_samples == 1:
            return _sums_of_one_sample(parameters, batch_gradient, self._exponent)
        if self.is_vectorized and has_only_rows(batch):
            try:
                with warnings.catch_warnings():
                    # torch warns of operators that it vectorizes with an internal loop, which is slower but equally exact
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    powers, absolutes, signed = self._sums_by_vmap(parameters, batch, num_samples, output_index)
                _check_sum_of_gradients(signed, absolutes, batch_gradient)
                return powers
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
                self.is_vectorized = (
                    False  # the loop is exact too, and raises again any error that the model itself raised
                )
        return self._sums_by_loop(parameters, batch, num_samples, output_index)

    def _sums_by_vmap(
        self, parameters: Mapping[str, Tensor], batch: Any, num_samples: int, output_index: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Three sums over samples: of the powers of the gradients, of their absolute values, and of the gradients themselves."""
        detached = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        per_sample, rebuild = split_samples(batch, num_samples)

        def value(parameters: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
            alone = rebuild([tensor.unsqueeze(0) for tensor in sample])
            return functional_call(self._embedder, parameters, (alone,))[0, output_index]

        powers, absolutes, signed = zero_sums(parameters), zero_sums(parameters), zero_sums(parameters)
        chunk = max(1, CHUNK_BYTES // sum(tensor.numel() * tensor.element_size() for tensor in parameters.values()))
        for start in range(0, num_samples, chunk):
            block = [tensor[start : start + chunk] for tensor in per_sample]
            with (
                torch.no_grad()
            ):  # records no graph for the other parameters; `grad` still records the graph that it needs
                gradients = vmap(grad(value), in_dims=(None, 0))(detached, block)
            for name in parameters:
                gradient = gradients[f"model.{name}"].to(powers[name].dtype)
                signed[name] += gradient.sum(0)
                absolutes[name] += gradient.abs_().sum(0)
                powers[name] += absolute_power(gradient, self._exponent).sum(0)
        return powers, absolutes, signed

    def _sums_by_loop(
        self, parameters: Mapping[str, Tensor], batch: Any, num_samples: int, output_index: int
    ) -> dict[str, Tensor]:
        sums = zero_sums(parameters)
        for index in range(num_samples):
            value = self._embedder(take_samples(batch, num_samples, [index]))[0, output_index]
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += absolute_power(gradient.to_dense().to(total.dtype), self._exponent)
        return sums


class _Embedder(nn.Module):
    """The model, `embed` and the output in one module, so that `functional_call` can replace the parameters."""

    def __init__(self, model: nn.Module, output: Output, embed: Embed | str | None) -> None:
        super().__init__()
        self.model, self._output, self._embed = model, output, embed

    def forward(self, batch: Any) -> Tensor:
        return self._output.values(embed_batch(self.model, batch, self._embed), batch)


def _sums_of_one_sample(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], exponent: int
) -> dict[str, Tensor]:
    """The powers of the gradients of a batch that consists of one sample."""
    sums = zero_sums(parameters)
    for name, total in sums.items():
        gradient = gradients[name]
        if gradient is not None:
            total += absolute_power(gradient.to_dense().to(total.dtype, copy=True), exponent)
    return sums


def _check_sum_of_gradients(
    signed: Mapping[str, Tensor], absolute: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]
) -> None:
    """Raises `ValueError` if the per-sample gradients do not add up to the gradient of the batch.

    They do not if `functional_call` missed a use of a parameter: it replaces a parameter where the model reads it as an
    attribute of its module, but not where the model holds another reference to it.

    Args:
        signed: the sum over samples of the gradients, by parameter name.
        absolute: the sum over samples of their absolute values, which sets the tolerance.
        expected: the gradient of the batch; None means zero.
    """
    for name, total in signed.items():
        batch_gradient = expected[name]
        difference = total if batch_gradient is None else total - batch_gradient.to_dense().to(total.dtype)
        is_half = batch_gradient is not None and batch_gradient.itemsize == 2
        single = 3e-2 if total.is_cuda else 2e-3  # a GPU may compute in TF32, with 11 digits
        tolerance = 1e-1 if is_half else {torch.float64: 1e-9}.get(total.dtype, single)
        if not bool(difference.norm() <= tolerance * absolute[name].norm()):  # written so that NaN fails the check
            raise ValueError(name)
