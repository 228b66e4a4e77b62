"""From a file to a config whose options are checked and whose defaults are filled in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mas_embed.config.options import component_lists, constructor_parameters, resolve_options
from mas_embed.config.schema import Component, Config, EvaluationSection, MethodSection, validate_config
from mas_embed.config.yaml_file import apply_override, read_yaml
from mas_embed.data import DATASETS
from mas_embed.errors import UserError
from mas_embed.evaluation import EVALUATORS
from mas_embed.losses import LOSSES, MINERS
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS
from mas_embed.registry import Registry
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS

# Options that the run provides, by what they are options of; each also takes what the data set provides. See `Provided`
PROVIDED_TO = {
    "model": {"splits"},
    "loss": {"splits", "num_classes", "embedding_size"},
    "method": {"splits", "loss"},
    "evaluator": {"splits", "subsets"},
    "callback": {"folder"},
}

AnyComponent = TypeVar("AnyComponent", bound=Component)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads and checks a config: options are checked against the constructors, and their defaults filled in.

    Args:
        path: of a YAML file.
        overrides: `key.path=value`, the value in YAML: "training.epochs=5", "methods.mas.strength=30", "seeds=[0, 1]".

    Raises:
        UserError: in one sentence what is wrong, and what is accepted.

    Example:
        >>> load_config("configs/digits.yaml", ["training.epochs=5"]).training.epochs
        5
    """
    raw = read_yaml(Path(path))
    for override in overrides:
        apply_override(raw, override)
    config = _with_resolved_options(validate_config(raw))
    _check_selections(config)
    return config


def candidates_of(options: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of several options, the last option changing fastest.

    Example:
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
    return config.model_copy(
        update={
            "data": _resolve("data", config.data, DATASETS),
            "model": _resolve("model", config.model, MODELS, provided=_provided(config, "model")),
            "loss": _resolve_loss(config, "loss", config.loss),
            "methods": tuple(_resolve_method(config, f"methods.{one.title}", one) for one in config.methods),
            "training": training.model_copy(
                update={
                    "optimizer": _resolve("training.optimizer", training.optimizer, OPTIMIZERS, given=["params"]),
                    "scheduler": _resolve("training.scheduler", training.scheduler, SCHEDULERS, given=["optimizer"]),
                    "miner": _resolve("training.miner", training.miner, MINERS),
                    "sampler": _resolve("training.sampler", training.sampler, SAMPLERS, given=["labels"]),
                }
            ),
            "evaluation": _resolve(
                "evaluation",
                config.evaluation,
                EVALUATORS,
                provided=_provided(config, "evaluator"),
                other_keys=EvaluationSection.model_fields.keys() - {"options"},
            ),
            "callbacks": tuple(
                _resolve(f"callbacks.{one.name}", one, CALLBACKS, provided=_provided(config, "callback"))
                for one in config.callbacks
            ),
        }
    )


def _provided(config: Config, kind: str) -> set[str]:
    return PROVIDED_TO[kind] | DATASETS.provided_by(config.data.name)


def _resolve(
    where: str, component: Any, registry: Registry, *, provided: Collection[str] = (), **keys: Collection[str]
) -> Any:
    """The component with resolved options; None for None."""
    if component is None:
        return None
    constructor = registry[component.name]
    _check_data_provides(where, constructor, component.options, provided)
    return component.with_options(resolve_options(where, constructor, component.options, provided=provided, **keys))


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


def _resolve_loss(config: Config, where: str, component: Component) -> Component:
    resolved: Component = _resolve(where, component, LOSSES, provided=_provided(config, "loss"))
    return resolved


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
        nested["loss"] = _resolve_loss(config, f"{where}.loss", loss).model_dump()
    provided = _provided(config, "method")
    _check_data_provides(where, constructor, {**options, **nested, "model": None}, provided)
    resolved = resolve_options(where, constructor, options, given={"model", *nested}, provided=provided)
    return component.with_options(resolved | nested)


def _components(where: str, value: Any) -> list[Component]:
    try:
        return TypeAdapter(list[Component]).validate_python(value)
    except ValidationError:
        raise UserError(
            f"{where} must be made of components such as [mas, {{name: lwf, strength: 3}}], got {value!r}"
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
