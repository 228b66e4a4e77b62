"""Exact per-sample gradients of values that all samples of a batch share, such as position embeddings.

A shared value s is computed from parameters alone and has no dimension for the samples. Every sample reads it through an
operation that repeats it: an `expand`, or an addition, a subtraction or a product that broadcasts. The output b of such an
operation has the samples in its first dimension, and the samples do not depend on each other. Row n of the gradient with
respect to b, which the backward pass of the batch computes, is therefore the gradient of sample n, and that with respect to s
is `(db/ds)^T` times this row, added up over all operations that repeat s.

N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mas_embed.importance.graph import AutogradGraph, Consumer, output_shapes
from mas_embed.importance.rules.memory import accumulation_dtype

_REPEATING_NODES = frozenset({"ExpandBackward0", "AddBackward0", "SubBackward0", "MulBackward0"})


@dataclass(frozen=True)
class Broadcast:
    """One operation that repeats a shared value for every sample.

    Attributes:
        node: the autograd node of the operation.
        source: the node and the number of its output that the operation repeats.
        shape: of the value that is repeated.
        factor: the derivative of the operation with respect to it.
    """

    node: Any
    source: GradientEdge
    shape: tuple[int, ...]
    factor: Tensor | float

    def per_sample(self, grad_output: Tensor) -> Tensor:
        """The gradients [N, *shape] from the gradient with respect to the output of the operation."""
        gradient = grad_output.to(accumulation_dtype(grad_output)) * self.factor
        aligned = (1,) * (gradient.ndim - len(self.shape)) + self.shape
        repeated = [dim for dim in range(1, gradient.ndim) if aligned[dim] == 1 and gradient.shape[dim] > 1]
        if repeated:
            gradient = gradient.sum(repeated, keepdim=True)
        return gradient.reshape(len(gradient), *self.shape)


@dataclass(frozen=True)
class Broadcasts:
    """All operations that repeat the values that are computed from one node.

    Attributes:
        found: the operations.
        signature: the kind and the shapes of every operation between the node and these, with the number of samples left out.
            Two batches with the same signature treat the node equally.
    """

    found: list[Broadcast]
    signature: list[Any]


def find_broadcasts(graph: AutogradGraph, node: Any, num_samples: int) -> Broadcasts | None:
    """The operations that repeat what is computed from a node; None if a value reaches the samples in another way."""
    result, pending, seen = Broadcasts([], []), [node], {node}
    while pending:
        source = pending.pop()
        source_shapes = output_shapes(source)
        for consumer in graph.consumers_of(source):
            shape, outputs = source_shapes[consumer.output], output_shapes(consumer.node)
            is_broadcast = _is_broadcast(consumer.node, shape, outputs, num_samples)
            kind = (type(consumer.node).__name__, consumer.slot, consumer.output, shape)
            result.signature.append((kind, is_broadcast, outputs[0][1:] if is_broadcast else outputs))
            if is_broadcast:
                factor = _factor(consumer)
                if factor is None:
                    return None
                edge = GradientEdge(source, consumer.output)
                result.found.append(Broadcast(consumer.node, edge, shape, factor))
            elif any(output[:1] == (num_samples,) for output in outputs):
                return None
            elif consumer.node not in seen:
                seen.add(consumer.node)
                pending.append(consumer.node)
    return result if result.found else None


def rows_are_samples(embeddings: Tensor, broadcasts: Broadcasts) -> bool:
    """Whether the first embedding depends on no other than the first row of the output of each operation."""
    edges = [GradientEdge(broadcast.node, 0) for broadcast in broadcasts.found]
    gradients = torch.autograd.grad(embeddings[0].sum(), edges, retain_graph=True, allow_unused=True)
    return not any(bool((gradient[1:] != 0).any()) for gradient in gradients if gradient is not None)


def per_sample_gradients(
    node: Any, shape: Sequence[int], gradients: Sequence[tuple[Broadcast, Tensor]], chunk_bytes: int
) -> Iterator[Tensor]:
    """The gradients [n, *shape] with respect to the output of a node, for consecutive chunks of the samples.

    Args:
        node: the node, as given to `find_broadcasts`.
        shape: of its output.
        gradients: operations that repeat what is computed from the node, each with the gradient with respect to its output.
        chunk_bytes: the memory for the gradients of a chunk.
    """
    if not gradients:
        return
    repeated = [broadcast.per_sample(gradient) for broadcast, gradient in gradients]
    size = max(1, chunk_bytes // max(1, torch.Size(shape).numel() * repeated[0].element_size()))
    for start in range(0, len(repeated[0]), size):
        block = [gradient[start : start + size] for gradient in repeated]
        total = block[0].new_zeros(len(block[0]), *shape)
        between: list[tuple[GradientEdge, Tensor]] = []
        for (broadcast, _), gradient in zip(gradients, block, strict=True):
            if broadcast.source.node is node:
                total += gradient
            else:
                between.append((broadcast.source, gradient))
        yield total + _through_shared_operations(node, between) if between else total


def _through_shared_operations(node: Any, between: Sequence[tuple[GradientEdge, Tensor]]) -> Tensor:
    """The gradients [n, ...] with respect to the output of the node, through the operations that all samples share."""
    edges = [edge for edge, _ in between]

    def derivative(gradients: list[Tensor], is_batched: bool) -> Tensor:
        return torch.autograd.grad(
            edges, [GradientEdge(node, 0)], gradients, retain_graph=True, is_grads_batched=is_batched
        )[0]

    gradients = [gradient for _, gradient in between]
    try:
        with warnings.catch_warnings():
            # torch warns of operators that it vectorizes with an internal loop, which is slower but equally exact
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return derivative(gradients, True)
    except (RuntimeError, NotImplementedError, TypeError):
        return torch.stack([derivative(list(rows), False) for rows in zip(*gradients, strict=True)])


def _is_broadcast(node: Any, shape: tuple[int, ...], outputs: Sequence[tuple[int, ...]], num_samples: int) -> bool:
    """Whether an operation repeats a value of this shape in a new first dimension, which has the size of the batch."""
    if type(node).__name__ not in _REPEATING_NODES or len(outputs) != 1 or num_samples == 1:
        return False
    return outputs[0][:1] == (num_samples,) and (len(shape) < len(outputs[0]) or shape[0] == 1)


def _factor(consumer: Consumer) -> Tensor | float | None:
    """The derivative of a repeating operation with respect to one of its two inputs; None if it is not available any more."""
    node, kind = consumer.node, type(consumer.node).__name__
    if kind == "MulBackward0":
        try:
            other = node._saved_other if consumer.slot == 0 else node._saved_self
        except RuntimeError:  # the other factor was modified in place afterwards; autograd would refuse it, too
            return None
        return other.detach() if isinstance(other, Tensor) else other
    if kind == "ExpandBackward0" or consumer.slot == 0:
        return 1.0
    alpha = float(node._saved_alpha)
    return alpha if kind == "AddBackward0" else -alpha
