"""From a file to a config whose options are checked and whose defaults are filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mas_embed.config.options import component_lists, constructor_parameters, resolve_options
from mas_embed.config.schema import (
    Component,
    Config,
    EvaluationSection,
    MethodSection,
    TransformsSection,
    validate_config,
)
from mas_embed.config.yaml_file import apply_override, read_yaml
from mas_embed.data import DATASETS, TRANSFORMS
from mas_embed.errors import UserError, explained
from mas_embed.evaluation import EVALUATORS
from mas_embed.losses import LOSSES, MINERS
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS, preprocessing_of
from mas_embed.registry import Registry
from mas_embed.runtime.text import shortened
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS

# Parameters that the program always passes itself, by the kind of component: they are no options
PASSED_TO = {
    "data set": {"learned"},
    "method": {"model"},
    "optimizer": {"params"},
    "scheduler": {"optimizer"},
    "sampler": {"labels"},
}

# Options that the run fills in where a config leaves them out, by the kind of component; each also takes what the data set
# provides, see `Registry.register`
PROVIDED_TO = {
    "model": {"splits"},
    "loss": {"splits", "num_classes", "embedding_size"},
    "method": {"splits", "loss"},
    "evaluator": {"splits", "subsets"},
    "callback": {"folder", "config"},
    "transform": {"size"},
}

AnyComponent = TypeVar("AnyComponent", bound=Component)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads and checks a config: options are checked against the constructors, and their defaults filled in.

    Args:
        path: of a YAML file.
        overrides: `key.path=value`, the value in YAML: "training.epochs=5", "methods.mas.strength=30", "seeds=[0, 1]".

    Raises:
        UserError: in one sentence what is wrong, and what is accepted.

    Examples:
        >>> load_config("configs/digits.yaml", ["training.epochs=5"]).training.epochs
        5
    """
    raw = read_yaml(Path(path))
    for override in overrides:
        apply_override(raw, override)
    return resolve_config(raw)


def resolve_config(raw: Mapping[str, Any]) -> Config:
    """A config from the content of its file, as `load_config` gives it; raises `UserError` as `load_config` does."""
    config = _with_resolved_options(validate_config(raw))
    _check_selections(config)
    return config


def candidates_of(options: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of several options, the last option changing fastest.

    Examples:
        >>> candidates_of({"strength": [1, 10], "decay": [0.5]})
        [{'strength': 1, 'decay': 0.5}, {'strength': 10, 'decay': 0.5}]
    """
    candidates: list[dict[str, Any]] = [{}]
    for name, values in options.items():
        candidates = [{**candidate, name: value} for candidate in candidates for value in values]
    return candidates


def with_candidate(
    config: Config, method: MethodSection, candidate: Mapping[str, Any], where: str | None = None
) -> MethodSection:
    """The method with the options of a candidate, checked as if the config had them, and nothing left to select.

    Raises:
        UserError: an option that the method does not take, or a value that it does not accept.
    """
    chosen = method.model_copy(update={"select": None, "options": {**method.options, **candidate}})
    return _resolve_method(config, where or f"methods.{method.title}", chosen)


def _with_resolved_options(config: Config) -> Config:
    training = config.training
    keys_of_evaluation = EvaluationSection.model_fields.keys() - {"options"}
    model = _resolve(config, "model", config.model, MODELS)
    return config.model_copy(
        update={
            "data": _resolve(config, "data", config.data, DATASETS),
            "transforms": _resolve_transforms(config, model),
            "model": model,
            "loss": _resolve(config, "loss", config.loss, LOSSES),
            "methods": tuple(_resolve_method(config, f"methods.{one.title}", one) for one in config.methods),
            "training": training.model_copy(
                update={
                    "optimizer": _resolve(config, "training.optimizer", training.optimizer, OPTIMIZERS),
                    "scheduler": _resolve(config, "training.scheduler", training.scheduler, SCHEDULERS),
                    "miner": _resolve(config, "training.miner", training.miner, MINERS),
                    "sampler": _resolve(config, "training.sampler", training.sampler, SAMPLERS),
                }
            ),
            "evaluation": _resolve(config, "evaluation", config.evaluation, EVALUATORS, other_keys=keys_of_evaluation),
            "callbacks": tuple(_resolve(config, f"callbacks.{one.name}", one, CALLBACKS) for one in config.callbacks),
        }
    )


def _resolve_transforms(config: Config, model: Component) -> TransformsSection:
    """The transforms with their options, and the normalization that is meant where none is named."""
    with explained("model"):
        has_colours = preprocessing_of(model.name, model.options) is not None
    normalize = config.transforms.normalize or ("weights" if has_colours else "none")
    if normalize == "weights" and not has_colours:
        raise UserError(
            f"transforms.normalize=weights needs a model with weights that ask for colours, but '{model.name}' has none under "
            "these options; choose data or none"
        )
    if normalize == "data" and config.start.weights is not None:
        raise UserError(
            "transforms.normalize=data takes mean and standard deviation from the new data, but the model of start.weights was "
            "trained with others; choose weights or none"
        )
    augment = tuple(
        _resolve(config, f"transforms.augment.{one.name}", one, TRANSFORMS) for one in config.transforms.augment
    )
    return TransformsSection(augment=augment, normalize=normalize)


def _resolve(config: Config, where: str, component: Any, registry: Registry, **keys: Collection[str]) -> Any:
    """The component with resolved options; None for None."""
    if component is None:
        return None
    constructor, provided = registry[component.name], _provided(config, registry.kind)
    _check_data_provides(where, constructor, component.options, provided)
    given = PASSED_TO.get(registry.kind, ())
    return component.with_options(
        resolve_options(where, constructor, component.options, given=given, provided=provided, **keys)
    )


def _provided(config: Config, kind: str) -> set[str]:
    """The options that the run fills in for a kind of component."""
    return PROVIDED_TO[kind] | DATASETS.provided_by(config.data.name) if kind in PROVIDED_TO else set()


def _check_data_provides(
    where: str, constructor: Callable[..., Any], options: Mapping[str, Any], provided: Collection[str]
) -> None:
    """Refuses a component with a required option that only other data sets provide."""
    for name, parameter in constructor_parameters(constructor).items():
        providers = [data for data in DATASETS if name in DATASETS.provided_by(data)]
        is_required = parameter.default is parameter.empty and name not in {*options, *provided}
        if is_required and providers:
            raise UserError(
                f"{where} needs '{name}', which this data set does not provide; take one that does: {', '.join(providers)}"
            )


def _resolve_method(config: Config, where: str, component: AnyComponent) -> AnyComponent:
    """A method with its options, those of the methods that it is made of, and of a loss other than the one that is trained."""
    options, constructor = dict(component.options), METHODS[component.name]
    nested: dict[str, Any] = {
        name: [
            _resolve_method(config, f"{where}.{name}.{part.name}", part).model_dump()
            for part in _components(f"{where}.{name}", options.pop(name, None))
        ]
        for name in component_lists(constructor, Method)
    }
    if "loss" in options and "loss" in constructor_parameters(constructor):
        (loss,) = _components(f"{where}.loss", [options.pop("loss")])
        nested["loss"] = _resolve(config, f"{where}.loss", loss, LOSSES).model_dump()
    provided = _provided(config, "method")
    _check_data_provides(where, constructor, {**options, **nested, "model": None}, provided)
    resolved = resolve_options(where, constructor, options, given={*PASSED_TO["method"], *nested}, provided=provided)
    return component.with_options(resolved | nested)


def _components(where: str, value: Any) -> list[Component]:
    try:
        return TypeAdapter(list[Component]).validate_python(value)
    except ValidationError:
        raise UserError(
            f"{where} must be made of components such as [mas, {{name: lwf, strength: 3}}], got {shortened(repr(value))}"
        ) from None


def _check_selections(config: Config) -> None:
    for method in config.methods:
        if method.select is None:
            continue
        where = f"methods.{method.title}.select"
        if "held_out" not in constructor_parameters(DATASETS[config.data.name]):
            raise UserError(
                f"{where} needs a validation part, but the data set '{config.data.name}' has no option held_out"
            )
        if config.data.options.get("held_out") == "validation":
            raise UserError(
                f"{where} chooses on the validation part, so the run must be evaluated on another: data.held_out=test"
            )
        if set(method.select.seeds) & set(config.seeds):
            raise UserError(f"{where}.seeds must differ from the run's seeds, {list(config.seeds)}")
        for candidate in candidates_of(method.select.options):
            with_candidate(config, method, candidate, where)
