"""Counts how often each parameter is used in an autograd graph, which proves that no use of a parameter was missed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from mas_embed.errors import UserError

# These nodes pass a parameter on with the same values (cast, reshaped, transposed), so their consumers are counted instead.
_PASS_THROUGH_NODES = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Unsqueeze", "Squeeze", "Expand", "ToCopy")
)


class AutogradGraph:
    """The autograd nodes that `root` depends on, and the edges between them, found in O(number of nodes).

    Args:
        root: a tensor with a `grad_fn`.

    Raises:
        UserError: the graph contains a reentrant checkpoint, whose operations autograd does not record.
    """

    def __init__(self, root: Tensor) -> None:
        self._consumers: dict[Any, list[Any]] = defaultdict(list)
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
            if hasattr(node, "variable"):
                self._leaves[id(node.variable)] = node
            for source, _ in getattr(node, "next_functions", ()):
                if source is None:
                    continue
                self._consumers[source].append(node)
                if source not in self._nodes:
                    self._nodes.add(source)
                    stack.append(source)

    def __contains__(self, node: Any) -> bool:
        return node in self._nodes

    def num_uses(self, parameter: Tensor) -> int:
        """The number of operations that use the parameter and that the root depends on; 0 if its gradient is always zero."""
        leaf = self._leaves.get(id(parameter))
        return 0 if leaf is None else self._num_consumers(leaf)

    def _num_consumers(self, node: Any) -> int:
        return sum(
            self._num_consumers(consumer) if type(consumer).__name__ in _PASS_THROUGH_NODES else 1
            for consumer in self._consumers[node]
        )
