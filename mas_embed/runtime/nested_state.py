"""States as nested dicts, and the flat dicts that files and other libraries' checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten_state(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested state, such as that of a method, as two flat dicts: of its tensors, and of everything else, which is JSON.

    The keys on the way to a value are joined by '/', as in "importance/0.weight"; a '/' in a key is escaped (RFC 6901).

    Args:
        state: nested mappings with keys of type str.
        prefix: what every key begins with.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{str(key).replace('~', '~0').replace('/', '~1')}"
        if isinstance(value, Mapping):
            inner_tensors, inner_others = flatten_state(value, f"{path}/")
            tensors |= inner_tensors
            others |= inner_others or ({} if value else {path: {}})
        elif isinstance(value, Tensor):
            tensors[path] = value
        else:
            others[path] = value
    return tensors, others


def unflatten_state(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested state of which `flatten_state` made the entries of `flat`, without a prefix."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, key = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/"))
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = value
    return nested
