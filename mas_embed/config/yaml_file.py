"""A config as a YAML file, and the overrides of the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mas_embed.errors import UserError, unknown_name


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML with two rules of YAML 1.2: `1e-3` is a number; `on`, `off`, `yes` and `no` are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as in the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file of 'key: value' pairs.

    Raises:
        UserError: it cannot be read, or does not hold such pairs.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"cannot read the config {path}: {reason}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold 'key: value' pairs such as 'name: digits', got {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `key.path=value`; a list of components is entered by name or label.

    Raises:
        UserError: it has another form, or the path does not lead to a key that can be set.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"an override must look like key.path=value, got '{override}'")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise UserError(f"the value of the override '{override}' is not valid YAML") from None
    section: Any = raw
    for depth, key in enumerate(keys[:-1]):
        section = _enter(section, key, ".".join(keys[: depth + 1]))
    if not isinstance(section, dict):
        raise UserError(f"cannot set '{path}': {'.'.join(keys[:-1])} is a list; name one of its entries first")
    section[keys[-1]] = value


def _enter(section: Any, key: str, path: str) -> dict[str, Any] | list[Any]:
    if isinstance(section, list):
        names = [entry.get("label", entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in section]
        if key not in names:
            raise unknown_name(f"entry of {path.rpartition('.')[0]}", key, [str(name) for name in names])
        index: Any = names.index(key)
    else:
        index = key
        if section.get(key) is None:
            section[key] = {}
    entry = section[index]
    if isinstance(entry, str):
        entry = section[index] = {"name": entry}
    if not isinstance(entry, dict | list):
        raise UserError(f"cannot set a key inside '{path}': it is {entry!r}, not a section")
    return entry
