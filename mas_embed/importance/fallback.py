"""Exact per-sample gradients for parameters that no rule covers: `vmap(grad)` in chunks, and a loop where that cannot go."""

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
from mas_embed.runtime.forward import Embed, embed_batch, map_tensors

CHUNK_BYTES = 256 * 2**20


class PerSampleGradients:
    """`sum_n |g_n|^exponent` of a batch, for chosen parameters, by differentiating each sample's own output.

    Remembers whether `torch.func.vmap` can trace the model; once it could not, every sample is differentiated on its
    own.
    """

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._embedder = _Embedder(model, output, embed)
        self._exponent = exponent
        modules = [module for _, module in model.named_modules(remove_duplicate=False)]
        # torch swaps the parameters of a module with two names twice, and does not put them back
        self.is_vectorized = len(set(modules)) == len(modules)

    def sums(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        num_samples: int,
        output_index: int,
        batch_gradient: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """The sum over samples for one output, by name, in the parameters' shapes, float32 or wider.

        Args:
            parameters: by name.
            batch: tensors of leading size `num_samples` in it are sliced by sample; everything else is shared.
            num_samples: N.
            output_index: which of the K scalars of a sample.
            batch_gradient: of the batch's summed output, to which those of the samples must add up.
        """
        if self.is_vectorized:
            try:
                with warnings.catch_warnings():
                    # An operator that torch vectorises by a loop of its own: slower, and just as exact
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    powers, absolutes, signed = self._vectorized(parameters, batch, num_samples, output_index)
                _check_sums(signed, absolutes, batch_gradient)
                return powers
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
                self.is_vectorized = False  # the loop below is exact too, and repeats any error that is the model's own
        return self._looped(parameters, batch, num_samples, output_index)

    def _vectorized(
        self, parameters: Mapping[str, Tensor], batch: Any, num_samples: int, output_index: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Sums over samples of the gradients' powers, of their absolute values, and of the gradients themselves."""
        detached = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        per_sample, rebuild = split_samples(batch, num_samples)

        def value(parameters: dict[str, Tensor], sample: list[Tensor]) -> Tensor:
            alone = rebuild([tensor.unsqueeze(0) for tensor in sample])
            return functional_call(self._embedder, parameters, (alone,))[0, output_index]

        powers, absolutes, signed = zero_sums(parameters), zero_sums(parameters), zero_sums(parameters)
        chunk = max(1, CHUNK_BYTES // sum(tensor.numel() * tensor.element_size() for tensor in parameters.values()))
        for start in range(0, num_samples, chunk):
            block = [tensor[start : start + chunk] for tensor in per_sample]
            with torch.no_grad():  # no graph through the other parameters; `grad` records its own all the same
                gradients = vmap(grad(value), in_dims=(None, 0))(detached, block)
            for name in parameters:
                gradient = gradients[f"model.{name}"].to(powers[name].dtype)
                signed[name] += gradient.sum(0)
                absolutes[name] += gradient.abs_().sum(0)
                powers[name] += absolute_power(gradient, self._exponent).sum(0)
        return powers, absolutes, signed

    def _looped(
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
    """The model with its embed override and output as one module, so that `functional_call` can swap its parameters."""

    def __init__(self, model: nn.Module, output: Output, embed: Embed | str | None) -> None:
        super().__init__()
        self.model, self._output, self._embed = model, output, embed

    def forward(self, batch: Any) -> Tensor:
        return self._output.values(embed_batch(self.model, batch, self._embed), batch)


def split_samples(batch: Any, num_samples: int) -> tuple[list[Tensor], Any]:
    """The batch's tensors of leading size `num_samples`, and a function that rebuilds the batch from such a list."""
    tensors: list[Tensor] = []

    def is_per_sample(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == num_samples

    def collect(tensor: Tensor) -> Tensor:
        if is_per_sample(tensor):
            tensors.append(tensor)
        return tensor

    map_tensors(collect, batch)

    def rebuild(replacements: list[Tensor]) -> Any:
        remaining = iter(replacements)
        return map_tensors(lambda tensor: next(remaining) if is_per_sample(tensor) else tensor, batch)

    return tensors, rebuild


def take_samples(batch: Any, num_samples: int, indices: list[int]) -> Any:
    """The batch with some of its samples only, in the order of `indices`."""
    tensors, rebuild = split_samples(batch, num_samples)
    return rebuild([tensor[indices] for tensor in tensors])


def _check_sums(
    signed: Mapping[str, Tensor], absolute: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]
) -> None:
    """Raises `ValueError` if the samples' gradients do not add up to the batch's: a use of a parameter was not seen.

    `vmap` sees a parameter where the model reads it as an attribute; one that is reached by another reference is not.
    """
    for name, total in signed.items():
        wanted = expected[name]
        difference = total if wanted is None else total - wanted.to_dense().to(total.dtype)
        is_half = wanted is not None and wanted.itemsize == 2
        tolerance = 1e-1 if is_half else {torch.float64: 1e-9}.get(total.dtype, 2e-3)
        if not bool(difference.norm() <= tolerance * absolute[name].norm()):  # so that NaN does not pass
            raise ValueError(name)
