"""YAML that may come from anywhere: plain values only, and no more of them than a config can have."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.text import printable, shortened

MOST_CHARACTERS = 250_000  # of a file; reading more would take minutes
# With those of anchors counted wherever they are used; a text counts once for every 100 characters
MOST_VALUES = 100_000
DEEPEST = 50  # sections and lists inside each other
LARGEST_INTEGER = 10**308  # any number of a config can be a float

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML with three rules of YAML 1.2.

    `1e-3` is a number; `on`, `off`, `yes` and `no` are words; `2020-01-31` is a text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (as in the base class)
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _refusal(key_node, "a key must be a word, not a list or a section")
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and printable(key) != key:
            raise _refusal(key_node, "a key must not hold characters that cannot be printed")
        if key in keys:
            raise _refusal(key_node, f"the key '{shortened(str(key), 80)}' is there twice")
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


def _bounded_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) < 2000:  # else Python refuses to read its decimal digits
        number: int = loader.construct_yaml_int(node)
        if abs(number) <= LARGEST_INTEGER:
            return number
    raise _refusal(node, "a number must lie between -1e308 and 1e308")


def _refusal(node: yaml.Node, message: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _bounded_integer)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """The safe dumper of PyYAML, which quotes a text that `_Loader` would read as a number: `'1e3'`."""


_Dumper.add_implicit_resolver(*_FLOAT)


def parse_yaml(text: str, complaint: str) -> Any:
    """The value that a YAML text holds, in which no list or section is the same object as another.

    Args:
        text: the YAML.
        complaint: how the message begins where the text is not accepted.

    Raises:
        UserError: the text is not YAML, or too much of it.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{complaint}: it has {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _measure(node, {})[0] > MOST_VALUES:
            raise _refusal(node, f"it holds more than {MOST_VALUES:,} values, each counted wherever its anchor is used")
        return _with_own_objects(loader.construct_document(node))
    except RecursionError:
        raise UserError(f"{complaint}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{complaint}: {printable(reason_of(error))}") from None


def to_yaml(values: dict[str, Any]) -> str:
    """The values as a text from which `parse_yaml` reads the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def _measure(node: yaml.Node, measured: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of values under a node, see `MOST_VALUES`, and the depth of their nesting.

    Visits every node once, however often anchors are used: O(file), although the number can grow exponentially with it.
    """
    if isinstance(node, yaml.ScalarNode):
        children: list[yaml.Node] = []
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
    if node in measured:
        known = measured[node]
        if known is None:
            raise _refusal(node, "an anchor contains itself")
        return known
    if node.tag not in _PLAIN_TAGS:
        raise _refusal(node, f"the tag {shortened(node.tag, 80)} is not accepted")
    measured[node] = None
    below = [_measure(child, measured) for child in children]
    size = sum((size for size, _ in below), 1 + (0 if children else len(node.value) // 100))
    depth = max((depth for _, depth in below), default=0) + 1
    if depth > DEEPEST:
        raise _refusal(node, "it is nested too deeply")
    measured[node] = size, depth
    return size, depth


def _with_own_objects(value: Any) -> Any:
    """The value with a copy for every use of an anchor, so that an override of one does not change the others."""
    if isinstance(value, dict):
        return {key: _with_own_objects(inner) for key, inner in value.items()}
    return [_with_own_objects(inner) for inner in value] if isinstance(value, list) else value
