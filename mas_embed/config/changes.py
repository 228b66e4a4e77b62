"""What a config says that is not a default."""

from __future__ import annotations

from typing import Any

from mas_embed.config.options import constructor_parameters
from mas_embed.config.schema import Component, MethodSection, validate_config
from mas_embed.data import DATASETS, TRANSFORMS
from mas_embed.errors import UserError
from mas_embed.evaluation import EVALUATORS
from mas_embed.losses import LOSSES, MINERS
from mas_embed.methods import METHODS
from mas_embed.models import MODELS
from mas_embed.registry import Registry
from mas_embed.runtime.yaml_text import parse_yaml, to_yaml
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS


def changed_options(config_yaml: str) -> str | None:
    """The resolved config of a run without everything that is a default of the schema or of a component's constructor.

    Options inside the options of a component stay as they are. Reading the result as a config gives the same run.

    Args:
        config_yaml: as `Config.to_yaml` gives it.

    Returns:
        YAML; None for a config that this version does not accept, or that names components which are not imported.
    """
    try:
        config = validate_config(parse_yaml(config_yaml, "the config"))
        training = config.training
        components = {
            "data": (config.data, DATASETS),
            "model": (config.model, MODELS),
            "loss": (config.loss, LOSSES),
            "evaluation": (config.evaluation, EVALUATORS),
        }
        in_training: dict[str, tuple[Component | None, Registry]] = {
            "optimizer": (training.optimizer, OPTIMIZERS),
            "scheduler": (training.scheduler, SCHEDULERS),
            "miner": (training.miner, MINERS),
            "sampler": (training.sampler, SAMPLERS),
        }
        changes: dict[str, Any] = _not_default(config)
        sections = ("transforms", "start", "importance", "report")
        changes |= {name: _not_default(getattr(config, name)) for name in sections if name in changes}
        changes |= {name: _short(one, registry) for name, (one, registry) in components.items()}
        changes["methods"] = [_short(method, METHODS) for method in config.methods]
        changes["training"] = _not_default(training) | {
            name: _short(one, registry) for name, (one, registry) in in_training.items() if one is not None
        }
        if config.callbacks:
            changes["callbacks"] = [_short(one, CALLBACKS) for one in config.callbacks]
        if config.transforms.augment:
            augment = [_short(one, TRANSFORMS) for one in config.transforms.augment]
            changes["transforms"] = {**_not_default(config.transforms), "augment": augment}
    except UserError:
        return None
    return to_yaml({name: value for name, value in changes.items() if value != {}})


def _not_default(section: Any) -> dict[str, Any]:
    """The fields of a section that differ from their defaults, as YAML can hold them."""
    fields = section.model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in type(section).model_fields.items()}
    return {name: fields[name] for name in fields if name in defaults and getattr(section, name) != defaults[name]}


def _short(component: Component, registry: Registry) -> Any:
    """A component by its name and the options that differ from the defaults of its constructor; the name alone without any."""
    parameters = constructor_parameters(registry[component.name])
    options = {
        name: value
        for name, value in component.options.items()
        if name not in parameters or not _is_default(value, parameters[name].default)
    }
    short = _not_default(component.with_options(options))
    fields = {name: value for name, value in short.items() if name not in ("name", "options")}
    both = {"name": component.name, **fields}
    nested = {name: value for name, value in options.items() if name in type(component).model_fields}
    both |= {name: value for name, value in options.items() if name not in nested}
    both |= {"options": nested} if nested else {}
    return component.name if len(both) == 1 and not isinstance(component, MethodSection) else both


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    return isinstance(value, bool) == isinstance(default, bool) and value == default
