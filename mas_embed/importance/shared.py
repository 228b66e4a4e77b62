"""Exact importance of values that all samples of a batch share, such as weights in matrix products and position embeddings.

A shared value is computed from parameters alone and has no dimension for the samples. The operations of `uses` are those
through which samples may use it; each gives the gradients of every sample with respect to the value that it uses. The
gradients with respect to the parameter are the derivative of the operations in between times these, added up over all uses.

N samples, S the shape of a shared value.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mas_embed.importance.calls import LayerCall
from mas_embed.importance.fallback import CHUNK_BYTES
from mas_embed.importance.graph import AutogradGraph, output_shapes
from mas_embed.importance.rules.lookup import embedding, shared_lookup
from mas_embed.importance.rules.memory import absolute_power
from mas_embed.importance.uses import Use, find_use

# These operations rearrange a value, so that their output is shared if their input is
_REARRANGING_NODES = frozenset(
    f"{name}Backward0"
    for name in (
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "Unsqueeze",
        "Squeeze",
        "Split",
        "SplitWithSizes",
        "ToCopy",
    )
)


class Step(NamedTuple):
    """One operation between a shared value and the samples; two batches with equal steps use the value equally.

    Attributes:
        operation: its kind, which of its inputs is the value, and the shape of that.
        sample_dim: the dimension of the samples in its output; -1 if the output is shared.
        sizes: the shapes of its outputs, without the dimension of the samples.
    """

    operation: tuple[Any, ...]
    sample_dim: int
    sizes: tuple[Any, ...]


@dataclass(frozen=True)
class SharedValue:
    """A value that all samples of a batch share: a parameter, or the result of a look-up in an embedding table.

    Attributes:
        name: of the parameter.
        node: the autograd node of the value.
        shape: of the value.
        lookup: the embedding table and the rows that were looked up; None if the value is the parameter itself.
        uses: the operations through which the samples use it.
        signature: all operations between the value and the samples.
    """

    name: str
    node: Any
    shape: tuple[int, ...]
    lookup: tuple[nn.Embedding, Tensor] | None
    uses: list[Use]
    signature: list[Step]

    def add_importance(
        self, total: Tensor, gradients: Mapping[Any, Tensor | None], exponent: int, scale: float
    ) -> None:
        """Adds `scale * sum_n |g_n|^exponent`, given the gradients with respect to the outputs of the operations by node."""
        pairs = [(use, gradients[use.node]) for use in self.uses]
        used = [(use, gradient) for use, gradient in pairs if gradient is not None]
        if len(used) == 1 and used[0][0].source.node is self.node and self.lookup is None:
            use, gradient = used[0]
            total.add_(use.sum_of_powers(gradient, exponent), alpha=scale)
            return
        for chunk in _per_sample_gradients(self.node, self.shape, used):
            if self.lookup is None:
                summed = absolute_power(chunk, exponent).sum(0)
            else:
                summed = shared_lookup(*self.lookup, chunk, exponent)
            total.add_(summed, alpha=scale)


def shared_value(
    name: str,
    parameter: nn.Parameter,
    graph: AutogradGraph,
    calls: Sequence[LayerCall],
    num_samples: int,
    expected: Sequence[Step] = (),
) -> SharedValue | None:
    """The value of a parameter that all samples share; None if there is none, or if its steps are not the expected ones.

    Args:
        name: of the parameter.
        parameter: the parameter.
        graph: of the batch.
        calls: all calls of the layer that holds the parameter, if it has a rule.
        num_samples: N.
        expected: the signature of the value in another batch; empty if it is not known yet.
    """
    node, lookup = graph.leaf_of(parameter), None
    if len(calls) == 1 and calls[0].rule.function is embedding and graph.num_uses(parameter) == 1:
        call = calls[0]
        if call.parameters.get("weight") is parameter and call.node in graph and not call.is_input_modified:
            assert isinstance(call.layer, nn.Embedding)
            node, lookup = call.node, (call.layer, call.input)
    shape = output_shapes(node)[0]
    found = _find_uses(graph, node, num_samples, expected)
    if found is None:
        return None
    uses, steps = found
    signature = [Step((lookup is None,), -1, shape), *steps]
    if expected and signature != list(expected):
        return None
    return SharedValue(name, node, shape, lookup, uses, signature)


def with_ordered_samples(values: Collection[SharedValue], embeddings: Tensor) -> list[SharedValue]:
    """The values whose uses have their samples in the same order: row 0 of each use belongs to the first sample.

    The sum over samples does not depend on their order, so that a value with one use is not checked.
    """
    nodes = list(dict.fromkeys(use.node for value in values if len(value.uses) > 1 for use in value.uses))
    if not nodes:
        return list(values)
    gradients = torch.autograd.grad(
        embeddings[0].sum(), [GradientEdge(node, 0) for node in nodes], retain_graph=True, allow_unused=True
    )
    gradient_of_node = dict(zip(nodes, gradients, strict=True))

    def is_first_sample(use: Use) -> bool:
        gradient = gradient_of_node[use.node]
        return gradient is None or not bool(use.rows(gradient)[1:].any())

    return [value for value in values if len(value.uses) == 1 or all(map(is_first_sample, value.uses))]


def _find_uses(
    graph: AutogradGraph, node: Any, num_samples: int, expected: Sequence[Step]
) -> tuple[list[Use], list[Step]] | None:
    """The operations through which samples use what is computed from a node, and all operations before them.

    None if a value reaches the samples in another way.
    """
    uses: list[Use] = []
    steps: list[Step] = []
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        source_shapes = output_shapes(source)
        for consumer in graph.consumers_of(source):
            shape, outputs = source_shapes[consumer.output], output_shapes(consumer.node)
            kind = type(consumer.node).__name__
            index = len(steps) + 1  # after the step of the value itself
            hint = expected[index].sample_dim if index < len(expected) else 0
            # In the other batch the output is shared, even if it has as many entries here as there are samples
            is_shared = kind in _REARRANGING_NODES or hint == -1
            edge = GradientEdge(source, consumer.output)
            use = None if is_shared else find_use(graph, edge, shape, consumer, num_samples, hint)
            if use is not None:
                dim = use.sample_dim
                sizes: tuple[Any, ...] = (*use.sizes[:dim], *use.sizes[dim + 1 :])
                uses.append(use)
            elif not is_shared and any(output[:1] == (num_samples,) for output in outputs):
                return None
            else:
                dim, sizes = -1, tuple(outputs)
                if consumer.node not in seen:
                    seen.add(consumer.node)
                    pending.append(consumer.node)
            steps.append(Step((kind, consumer.slot, consumer.output, shape), dim, sizes))
    is_alone = len(uses) == 1 and uses[0].source.node is node
    return (uses, steps) if uses and (is_alone or all(use.has_gradients for use in uses)) else None


def _per_sample_gradients(node: Any, shape: Sequence[int], used: Sequence[tuple[Use, Tensor]]) -> Iterator[Tensor]:
    """The gradients [n, *shape] with respect to the output of a node, for consecutive chunks of the samples.

    Args:
        node: the node of the shared value.
        shape: of its output.
        used: uses of what is computed from the node, each with the gradient with respect to its output.
    """
    if not used:
        return
    deltas = [use.deltas(gradient) for use, gradient in used]
    size = max(1, CHUNK_BYTES // max(1, torch.Size(shape).numel() * deltas[0].element_size()))
    for start in range(0, len(deltas[0]), size):
        block = slice(start, start + size)
        total = deltas[0].new_zeros(len(deltas[0][block]), *shape)
        between: list[tuple[GradientEdge, Tensor]] = []
        for (use, _), delta in zip(used, deltas, strict=True):
            gradient = use.gradients(delta, block)
            if use.source.node is node:
                total += gradient
            else:
                between.append((use.source, gradient))
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
