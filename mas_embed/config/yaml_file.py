"""A config as a YAML file, and the overrides of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.reading import check_regular_file, read_text
from mas_embed.runtime.text import printable, shortened
from mas_embed.runtime.yaml_text import MOST_CHARACTERS, parse_yaml


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file of 'key: value' pairs.

    Raises:
        UserError: it cannot be read, or does not hold such pairs.
    """
    check_regular_file(path, "the config")
    if path.stat().st_size > 4 * MOST_CHARACTERS:
        raise UserError(f"the config {path} has {path.stat().st_size:,} bytes, more than {4 * MOST_CHARACTERS:,}")
    raw = parse_yaml(read_text(path, "the config"), f"{path} is not valid YAML")
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold 'key: value' pairs such as 'name: digits', got {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `key.path=value`; a list of components is entered by name or label.

    Raises:
        UserError: it has another form, or the path does not lead to a key that can be set.
    """
    path, equals, text = override.partition("=")
    keys, quoted = path.strip().split("."), shortened(printable(override))
    if not equals or not all(keys):
        raise UserError(f"an override must look like key.path=value, got '{quoted}'")
    value = parse_yaml(text, f"the value of the override '{quoted}' is not valid YAML")
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
