"""A whole run as one YAML file: its schema, its options checked against the constructors."""

from mas_embed.config.changes import changed_options
from mas_embed.config.described import described_options
from mas_embed.config.options import component_lists, constructor_parameters, resolve_options
from mas_embed.config.resolve import PASSED_TO, PROVIDED_TO, candidates_of, load_config, resolve_config, with_candidate
from mas_embed.config.schema import Component, Config, MethodSection, validate_config
from mas_embed.config.yaml_file import read_yaml

__all__ = [
    "PASSED_TO",
    "PROVIDED_TO",
    "Component",
    "Config",
    "MethodSection",
    "candidates_of",
    "changed_options",
    "component_lists",
    "constructor_parameters",
    "described_options",
    "load_config",
    "read_yaml",
    "resolve_config",
    "resolve_options",
    "validate_config",
    "with_candidate",
]
