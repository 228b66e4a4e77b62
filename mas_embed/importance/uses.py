"""The operations through which the samples of a batch use a value that all of them share, such as a weight.

Row n of the gradient with respect to the output of such an operation, which the backward pass of the batch computes, belongs
to sample n, because the samples do not depend on each other. The gradient of sample n with respect to the shared value is
therefore the transposed derivative of the operation times row n.

N samples, T positions, I/O in/out features, D columns of a table, S the shape of the shared value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mas_embed.importance.graph import AutogradGraph, Consumer, output_shapes
from mas_embed.importance.rules.linear import sum_over_samples
from mas_embed.importance.rules.lookup import sum_over_pairs
from mas_embed.importance.rules.memory import absolute_power, accumulation_dtype

_ADDITIONS = ("AddBackward0", "SubBackward0")
_BROADCASTS = (*_ADDITIONS, "MulBackward0", "ExpandBackward0", "RepeatBackward0")
_WEIGHT_SLOTS = {"MmBackward0": 1, "AddmmBackward0": 2}  # which input of a matrix product is the second matrix
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
_SUM, _MEAN = 0, 1  # the numbers that torch gives the modes of an `EmbeddingBag`


@dataclass(frozen=True)
class Use:
    """One operation through which every sample uses a shared value.

    Attributes:
        node: the autograd node of the operation.
        source: the node and the number of its output that is the shared value.
        shape: of the shared value, S.
        sizes: the shape of the output of the operation, in which the positions of a matrix product have their own dimensions.
        sample_dim: the dimension of `sizes` that is the samples.
    """

    node: Any
    source: GradientEdge
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    sample_dim: int
    has_gradients: ClassVar[bool] = True  # whether `gradients` is implemented

    def rows(self, grad_output: Tensor) -> Tensor:
        """The gradient with respect to the output, with the samples in the first dimension."""
        return grad_output.reshape(self.sizes).movedim(self.sample_dim, 0)

    def deltas(self, grad_output: Tensor) -> Tensor:
        """What `gradients` needs of the gradient with respect to the output, with the samples in the first dimension."""
        raise NotImplementedError

    def gradients(self, deltas: Tensor, block: slice) -> Tensor:
        """The gradients [n, *S] of a block of samples with respect to the shared value, in float32 or wider."""
        raise NotImplementedError

    def sum_of_powers(self, grad_output: Tensor, exponent: int) -> Tensor:
        """`sum_n |g_n|^exponent` [*S] over all samples."""
        return absolute_power(self.gradients(self.deltas(grad_output), slice(None)), exponent).sum(0)


@dataclass(frozen=True)
class Broadcast(Use):
    """An expansion, or an addition, a subtraction or a product by elements, that repeats the value for every sample.

    Attributes:
        factor: the derivative of the operation with respect to the value.
    """

    factor: Tensor | float

    def deltas(self, grad_output: Tensor) -> Tensor:
        gradient = grad_output.to(accumulation_dtype(grad_output)) * self.factor
        aligned = _aligned(self.shape, self.sizes)
        repeated = [
            dim for dim, size in enumerate(self.sizes) if dim != self.sample_dim and aligned[dim] == 1 and size > 1
        ]
        if repeated:
            gradient = gradient.sum(repeated, keepdim=True)
        return gradient.movedim(self.sample_dim, 0).reshape(self.sizes[self.sample_dim], *self.shape)

    def gradients(self, deltas: Tensor, block: slice) -> Tensor:
        return deltas[block]


@dataclass(frozen=True)
class Product(Use):
    """A matrix product of rows of the samples with a weight, or the bias that is added to it.

    Attributes:
        input: the rows that are multiplied, in the order of the rows of the output; None if the value is the bias.
        is_transposed: whether the weight is [O, I] and its transpose is multiplied, instead of a weight [I, O].
    """

    input: Tensor | None
    is_transposed: bool

    def deltas(self, grad_output: Tensor) -> Tensor:
        """The gradient with respect to the output as [N, T, O]."""
        return self._positions(grad_output.to(accumulation_dtype(grad_output)))

    def gradients(self, deltas: Tensor, block: slice) -> Tensor:
        delta_NTO = deltas[block]
        if self.input is None:
            return delta_NTO.sum(1)
        input_NTI = self._positions(self.input.to(deltas.dtype))[block]
        return delta_NTO.mT @ input_NTI if self.is_transposed else input_NTI.mT @ delta_NTO

    def sum_of_powers(self, grad_output: Tensor, exponent: int) -> Tensor:
        if self.input is None:
            return super().sum_of_powers(grad_output, exponent)
        delta_NTO = self.deltas(grad_output)
        total = sum_over_samples(self._positions(self.input.to(delta_NTO.dtype)), delta_NTO, exponent)
        return total if self.is_transposed else total.T

    def _positions(self, rows: Tensor) -> Tensor:
        """Rows in the order of the output, [N * T, features], as [N, T, features]."""
        by_sample = rows.reshape(*self.sizes[:-1], rows.shape[-1]).movedim(self.sample_dim, 0)
        return by_sample.reshape(len(by_sample), -1, rows.shape[-1])


@dataclass(frozen=True)
class BagLookup(Use):
    """A look-up in an embedding table [V, D] that adds up, or averages, the rows of every sample (`nn.EmbeddingBag`).

    Attributes:
        row_index: the rows that are looked up, of all samples one after the other.
        bag_index: the sample of each of them.
        weight: of each of them.
    """

    row_index: Tensor
    bag_index: Tensor
    weight: Tensor
    has_gradients: ClassVar[bool] = False  # every sample reads few of the rows

    def sum_of_powers(self, grad_output: Tensor, exponent: int) -> Tensor:
        delta = grad_output.to(accumulation_dtype(grad_output))[self.bag_index]
        delta *= self.weight.unsqueeze(1).to(delta.dtype)
        return sum_over_pairs(self.shape[0], self.bag_index, self.row_index, delta, exponent)


def find_use(
    graph: AutogradGraph, source: GradientEdge, shape: tuple[int, ...], consumer: Consumer, num_samples: int, hint: int
) -> Use | None:
    """How the samples use a shared value through one of its consumers; None if the consumer is no such operation.

    Args:
        graph: of the batch.
        source: the node and the number of its output that is the shared value.
        shape: of the value.
        consumer: the operation.
        num_samples: N. A dimension of this size is taken for that of the samples; the caller compares two batches of different
            N to find out whether it is.
        hint: the dimension of the samples that is preferred if several have this size.
    """
    kind, outputs = type(consumer.node).__name__, output_shapes(consumer.node)
    if num_samples == 1 or len(outputs) != 1:
        return None
    try:
        if kind in _BROADCASTS:
            return _broadcast(source, shape, consumer, outputs[0], num_samples, hint)
        if kind in _WEIGHT_SLOTS:
            return _product(graph, source, shape, consumer, outputs[0], num_samples, hint)
        if kind == "EmbeddingBagBackward0" and outputs[0][0] == num_samples:
            return _bag_lookup(source, shape, consumer.node, outputs[0])
    except RuntimeError:  # a saved tensor was modified in place afterwards; autograd would refuse it, too
        return None
    return None


def _sample_dim(sizes: Sequence[int], num_samples: int, hint: int) -> int | None:
    """The dimension of size N, which is the preferred one if that has this size, and else the first."""
    if hint < len(sizes) and sizes[hint] == num_samples:
        return hint
    return sizes.index(num_samples) if num_samples in sizes else None


def _aligned(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with leading ones, as broadcasting aligns it with the sizes."""
    return (1,) * (len(sizes) - len(shape)) + shape


def _broadcast(
    source: GradientEdge,
    shape: tuple[int, ...],
    consumer: Consumer,
    sizes: tuple[int, ...],
    num_samples: int,
    hint: int,
) -> Broadcast | None:
    aligned = _aligned(shape, sizes)
    # A dimension that the value has itself is not that of the samples
    dim = _sample_dim([size if own == 1 else -1 for size, own in zip(sizes, aligned, strict=True)], num_samples, hint)
    if dim is None or any(own not in (1, size) for size, own in zip(sizes, aligned, strict=True)):
        return None
    return Broadcast(consumer.node, source, shape, sizes, dim, _factor(consumer))


def _factor(consumer: Consumer) -> Tensor | float:
    """The derivative of a broadcasting operation with respect to one of its two inputs."""
    node, kind = consumer.node, type(consumer.node).__name__
    if kind == "MulBackward0":
        other = node._saved_other if consumer.slot == 0 else node._saved_self
        return other.detach() if isinstance(other, Tensor) else other
    if kind not in _ADDITIONS or consumer.slot == 0:
        return 1.0
    alpha = float(node._saved_alpha)
    return alpha if kind == "AddBackward0" else -alpha


def _product(
    graph: AutogradGraph,
    source: GradientEdge,
    shape: tuple[int, ...],
    consumer: Consumer,
    output: tuple[int, ...],
    num_samples: int,
    hint: int,
) -> Product | None:
    node = consumer.node
    weight_slot = _WEIGHT_SLOTS[type(node).__name__]
    is_bias = weight_slot == 2 and consumer.slot == 0 and shape == output[1:]
    sizes = _positions_of_rows(graph, node, output, num_samples)
    dim = _sample_dim(sizes[:-1], num_samples, hint)
    if dim is None or not (is_bias or consumer.slot == weight_slot):
        return None
    if weight_slot == 2 and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    if is_bias:
        return Product(node, source, shape, sizes, dim, None, is_transposed=False)
    rows = node._saved_self if weight_slot == 1 else node._saved_mat1
    # `F.linear` multiplies with the transpose of its weight; the weight itself is then the shared value
    is_transposed = type(source.node).__name__ == "TBackward0"
    if is_transposed:
        weight: Any = source.node.next_functions[0]
        source, shape = GradientEdge(*weight), shape[::-1]
    return Product(node, source, shape, sizes, dim, rows.detach(), is_transposed)


def _positions_of_rows(graph: AutogradGraph, node: Any, output: tuple[int, ...], num_samples: int) -> tuple[int, ...]:
    """The shape of the output of a matrix product before its rows were flattened, which the view after it restores."""
    if output[0] == num_samples:
        return output
    consumers = graph.consumers_of(node)
    while len(consumers) == 1 and type(consumers[0].node).__name__ == "_GradientTapBackward":
        consumers = graph.consumers_of(consumers[0].node)
    if len(consumers) == 1 and type(consumers[0].node).__name__ in _VIEWS:
        sizes = output_shapes(consumers[0].node)[0]
        if sizes[-1:] == output[1:] and prod(sizes[:-1]) == output[0]:
            return sizes
    return output


def _bag_lookup(source: GradientEdge, shape: tuple[int, ...], node: Any, output: tuple[int, ...]) -> BagLookup | None:
    if node._saved_mode not in (_SUM, _MEAN) or node._saved_scale_grad_by_freq:
        return None
    row_index, offsets, weight = node._saved_indices, node._saved_offsets, node._saved_per_sample_weights
    positions = torch.arange(len(row_index), device=row_index.device, dtype=offsets.dtype)
    bag_index = torch.searchsorted(offsets, positions, right=True) - 1
    # torch leaves out the rows of padding, and those after the last offset if the end of the last sample is given
    is_used = (row_index != node._saved_padding_idx) & (bag_index < output[0])
    row_index, bag_index = row_index[is_used], bag_index[is_used]
    if node._saved_mode == _MEAN:
        weight = bag_index.bincount(minlength=output[0])[bag_index].double().reciprocal()
    else:
        weight = weight.detach()[is_used] if weight is not None else torch.ones_like(row_index)
    return BagLookup(node, source, shape, output, 0, row_index, bag_index, weight)
