"""The proof that no use of a parameter was missed: how often each is used in an autograd graph, read off the graph itself."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from mas_embed.errors import UserError

# Nodes that hand a parameter on unchanged (cast, reshaped, transposed): what counts is who takes it after them.
_PASSING_ON = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Unsqueeze", "Squeeze", "Expand", "ToCopy")
)


class AutogradGraph:
    """The nodes that lead to `root`, and the edges between them.

    Args:
        root: a tensor with a gradient function; O(number of nodes).

    Raises:
        UserError: there is a node whose inside autograd does not know.
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
                    "reentrant gradient checkpointing hides what it runs from autograd; pass use_reentrant=False to checkpoint"
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
        """How many operations take the parameter on a path to the root; 0 if its gradient is identically zero."""
        leaf = self._leaves.get(id(parameter))
        return 0 if leaf is None else self._num_takers(leaf)

    def _num_takers(self, node: Any) -> int:
        return sum(
            self._num_takers(consumer) if type(consumer).__name__ in _PASSING_ON else 1
            for consumer in self._consumers[node]
        )
