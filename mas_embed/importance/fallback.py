"""Exact per-sample gradients for parameters that no rule covers: `vmap(grad)` in chunks, and a loop where that cannot go."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mas_embed.forward import Embed, embed_batch, map_tensors
from mas_embed.importance.outputs import Output

CHUNK_BYTES = 256 * 2**20


class PerSampleGradients:
    """`sum_n |g_n|^exponent` of a batch, for chosen parameters, by differentiating each sample's own output.

    Remembers whether `torch.func.vmap` can trace the model; once it could not, every sample is differentiated on its
    own.
    """

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._embedder = _Embedder(model, output, embed)
        self._exponent = exponent
        self.is_vectorized = True

    def sums(self, names: Iterable[str], batch: Any, num_samples: int, num_outputs: int) -> dict[str, Tensor]:
        """The sum over samples and outputs, by name, in the parameters' shapes, float32 or wider.

        Args:
            names: of the parameters.
            batch: tensors of leading size `num_samples` in it are sliced by sample; everything else is shared.
            num_samples: N.
            num_outputs: K, the scalars per sample.
        """
        own = dict(self._embedder.model.named_parameters())
        parameters: dict[str, Tensor] = {name: own[name] for name in names}
        if self.is_vectorized:
            try:
                with warnings.catch_warnings():
                    # An operator that torch vectorises by a loop of its own: slower, and just as exact
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return self._vectorized(parameters, batch, num_samples, num_outputs)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                self.is_vectorized = False  # the loop below is exact too, and repeats any error that is the model's own
        return self._looped(parameters, batch, num_samples, num_outputs)

    def _vectorized(
        self, parameters: dict[str, Tensor], batch: Any, num_samples: int, num_outputs: int
    ) -> dict[str, Tensor]:
        detached = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        per_sample, rebuild = split_samples(batch, num_samples)

        def value(parameters: dict[str, Tensor], sample: list[Tensor], output_index: int) -> Tensor:
            return functional_call(self._embedder, parameters, (rebuild([tensor.unsqueeze(0) for tensor in sample]),))[
                0, output_index
            ]

        sums = _zeros(parameters)
        chunk = max(1, CHUNK_BYTES // sum(tensor.numel() * tensor.element_size() for tensor in parameters.values()))
        for output_index in range(num_outputs):
            for start in range(0, num_samples, chunk):
                block = [tensor[start : start + chunk] for tensor in per_sample]
                gradients = vmap(grad(value), in_dims=(None, 0, None))(detached, block, output_index)
                for name, total in sums.items():
                    total += gradients[f"model.{name}"].to(total.dtype).abs().pow_(self._exponent).sum(0)
        return sums

    def _looped(
        self, parameters: dict[str, Tensor], batch: Any, num_samples: int, num_outputs: int
    ) -> dict[str, Tensor]:
        sums = _zeros(parameters)
        for sample in iterate_samples(batch, num_samples):
            values = self._embedder(sample)[0]
            for output_index in range(num_outputs):
                is_last = output_index == num_outputs - 1
                gradients = torch.autograd.grad(
                    values[output_index], list(parameters.values()), retain_graph=not is_last, allow_unused=True
                )
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total += gradient.to(total.dtype).abs().pow_(self._exponent)
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


def iterate_samples(batch: Any, num_samples: int) -> Iterator[Any]:
    """The batch as `num_samples` batches of one sample."""
    tensors, rebuild = split_samples(batch, num_samples)
    for index in range(num_samples):
        yield rebuild([tensor[index : index + 1] for tensor in tensors])


def _zeros(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(
            parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False
        )
        for name, parameter in parameters.items()
    }
