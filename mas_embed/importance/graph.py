"""Counts how often each parameter is used in an autograd graph, which proves that no use of a parameter was missed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mas_embed.errors import UserError

# These nodes pass a parameter on with the same values (cast, reshaped, transposed), so their consumers are counted instead.
_PASS_THROUGH_NODES = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Unsqueeze", "Squeeze", "Expand", "ToCopy")
)


class Consumer(NamedTuple):
    """A node that takes an output of another node.

    Attributes:
        node: the consumer.
        slot: the position among its inputs.
        output: the number of the output that it takes.
    """

    node: Any
    slot: int
    output: int


def output_shapes(node: Any) -> list[tuple[int, ...]]:
    """The shapes of the tensors that an operation returned, from its autograd node."""
    return [tuple(metadata.shape) for metadata in node._input_metadata]


class AutogradGraph:
    """The autograd nodes that `root` depends on, and the edges between them, found in O(number of nodes).

    Args:
        root: a tensor with a `grad_fn`.

    Raises:
        UserError: the graph contains a reentrant checkpoint, whose operations autograd does not record.
    """

    def __init__(self, root: Tensor) -> None:
        self._consumers: dict[Any, list[Consumer]] = defaultdict(list)
        self._leaves: dict[int, Any] = {}
        stack: list[Any] = [root.grad_fn]
        self._nodes: set[Any] = set(stack)
        while stack:
            node = stack.pop()
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise UserError(
                    "reentrant gradient checkpointing hides the operations that it runs from autograd; "
                    "pass use_reentrant=False to checkpoint"
                )
            edges = getattr(node, "next_functions", ())
            if not edges and hasattr(node, "variable"):
                self._leaves[id(node.variable)] = node
            for slot, (source, output) in enumerate(edges):
                if source is None:
                    continue
                self._consumers[source].append(Consumer(node, slot, output))
                if source not in self._nodes:
                    self._nodes.add(source)
                    stack.append(source)

    def __contains__(self, node: Any) -> bool:
        return node in self._nodes

    def leaf_of(self, parameter: Tensor) -> Any:
        """The node that accumulates the gradient of the parameter; None if the root does not depend on the parameter."""
        return self._leaves.get(id(parameter))

    def consumers_of(self, node: Any) -> Sequence[Consumer]:
        """The nodes that take an output of the node and that the root depends on."""
        return self._consumers.get(node, ())

    def num_uses(self, parameter: Tensor) -> int:
        """The number of operations that use the parameter and that the root depends on; 0 if its gradient is always zero."""
        leaf = self.leaf_of(parameter)
        return 0 if leaf is None else self._num_consumers(leaf)

    def _num_consumers(self, node: Any) -> int:
        return sum(
            self._num_consumers(consumer.node) if type(consumer.node).__name__ in _PASS_THROUGH_NODES else 1
            for consumer in self.consumers_of(node)
        )
