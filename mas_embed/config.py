"""A whole run as one YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mas_embed.data import DATASETS
from mas_embed.errors import UserError, unknown_name
from mas_embed.losses import catalogue
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS
from mas_embed.options import component_lists, constructor_parameters, resolve_options
from mas_embed.retrieval import Distance
from mas_embed.selection import candidates_of
from mas_embed.training import per_class_sampler

PositiveCount = Annotated[StrictInt, Field(gt=0, le=2**31)]

SAMPLERS: dict[str, Callable[..., Any]] = {"MPerClassSampler": per_class_sampler}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Component(_Section):
    """Something that is made by name: `mas`, or `{name: mas, strength: 100}`; options are those of its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name (and a method's label and what is to be selected)."""
        return dict(self.model_extra or {})


class SelectSection(_Section):
    """How options of a method are chosen: `select: {strength: [1, 10, 100]}`; every other key is an option with its candidates.

    Every candidate is trained on the same data, judged by its validation part, with seeds of its own.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    by: Literal["final_average", "backward_transfer", "learning"] = "final_average"
    on: Literal["validation"] = "validation"
    seeds: tuple[StrictInt, ...] = Field(default=(1000, 1001, 1002), min_length=1)
    num_splits: PositiveCount | None = None  # of the sequence's first; None: all

    @model_validator(mode="after")
    def _has_candidates(self) -> SelectSection:
        if not self.grid or not all(isinstance(values, list) and values for values in self.grid.values()):
            raise UserError(
                f"select must give a list of values for at least one option, as in {{strength: [1, 10]}}, got {self.grid}"
            )
        return self

    @property
    def grid(self) -> dict[str, list[Any]]:
        """By option its candidates."""
        return dict(self.model_extra or {})


class MethodComponent(Component):
    """A method; `label` tells two of one name apart, in tables and folders; `select` chooses options of it."""

    label: str = Field(default="", pattern=r"^(\w[\w .()=,+-]*)?$", max_length=100)
    select: SelectSection | None = None

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class TrainingSection(_Section):
    """How a split is trained."""

    epochs: PositiveCount = 20
    batch_size: PositiveCount = 64
    optimizer: Component = Component(name="Adam")
    miner: Component | None = None
    sampler: Component | None = None

    @field_validator("optimizer", mode="before")
    @classmethod
    def _is_adam_unless_named(cls, value: Any) -> Any:
        return {"name": "Adam", **value} if isinstance(value, dict) else value


class EvaluationSection(_Section):
    """How a split is judged."""

    distance: Distance = "cosine"
    recall_at: tuple[PositiveCount, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    watch_index: bool = True
    primary_metric: str = "mean_average_precision"

    @model_validator(mode="after")
    def _is_measured(self) -> EvaluationSection:
        measured = {f"recall_at_{k}" for k in self.recall_at}
        measured |= {
            "mean_average_precision",
            "mean_average_precision_at_r",
            "r_precision",
            "mean_reciprocal_rank",
            "precision_at_1",
        }
        if self.primary_metric not in measured:
            raise unknown_name("evaluation.primary_metric", self.primary_metric, measured)
        return self


class Config(_Section):
    """A whole run: what `load_config` returns, with every default filled in."""

    name: str = Field(pattern=r"^[\w-]+$", max_length=100)
    seeds: tuple[StrictInt, ...] = Field(default=(0,), min_length=1)
    data: Component
    model: Component
    loss: Component
    methods: tuple[MethodComponent, ...] = Field(min_length=1)
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"seeds must be different numbers >= 0, got {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _titles_are_distinct(self) -> Config:
        titles = [method.title for method in self.methods]
        for title in titles:
            if titles.count(title) > 1:
                raise UserError(f"there are two methods '{title}'; give each a label: {{name: {title}, label: ...}}")
        return self

    def to_yaml(self) -> str:
        """The config as a file that `load_config` reads, every default filled in."""
        plain = self.model_dump(mode="json", exclude={"methods": {"__all__": {"label", "select"}}})
        for method, entry in zip(self.methods, plain["methods"], strict=True):
            if method.label:
                entry["label"] = method.label
            if method.select:
                entry["select"] = method.select.model_dump(mode="json")
        return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)


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
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise _readable(error) from None
    resolved = _with_resolved_options(config)
    _check_selections(resolved)
    return resolved


def _with_resolved_options(config: Config) -> Config:
    training = config.training
    return config.model_copy(
        update={
            "data": _resolve("data", config.data, DATASETS),
            "model": _resolve("model", config.model, MODELS),
            "loss": _resolve("loss", config.loss, _Catalogue("loss", catalogue("losses"))),
            "methods": tuple(_resolve_method(f"methods.{method.title}", method) for method in config.methods),
            "training": training.model_copy(
                update={
                    "optimizer": _resolve("training.optimizer", training.optimizer, _optimizers(), given={"params"}),
                    "miner": _resolve("training.miner", training.miner, _Catalogue("miner", catalogue("miners"))),
                    "sampler": _resolve(
                        "training.sampler", training.sampler, _Catalogue("sampler", SAMPLERS), given={"labels"}
                    ),
                }
            ),
        }
    )


def _resolve(where: str, component: Any, known: Mapping[str, Callable[..., Any]], given: Iterable[str] = ()) -> Any:
    if component is None:
        return None
    options = resolve_options(where, known[component.name], component.options, given=frozenset(given))
    return _with_options(component, options)


def _with_options(component: Any, options: Mapping[str, Any]) -> Any:
    fixed = {"name": component.name}
    if isinstance(component, MethodComponent):
        fixed |= {"label": component.label, "select": component.select}
    return type(component).model_validate({**fixed, **options})


def with_candidate(method: MethodComponent, candidate: Mapping[str, Any], where: str | None = None) -> MethodComponent:
    """The method with the options of a candidate, checked as if the config had them.

    Raises:
        UserError: an option that the method does not take, or a value that it does not accept.
    """
    chosen = MethodComponent.model_validate({"name": method.name, "label": method.label, **method.options, **candidate})
    resolved: MethodComponent = _resolve_method(where or f"methods.{method.title}", chosen)
    return resolved


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
                f"{where} chooses on the validation part, so the run must be judged by another: data.held_out=test"
            )
        if set(method.select.seeds) & set(config.seeds):
            raise UserError(f"{where}.seeds must differ from the run's seeds, {list(config.seeds)}")
        for candidate in candidates_of(method.select.grid):
            with_candidate(method, candidate, where)


def _resolve_method(where: str, component: Any) -> Any:
    """A method with its options, those of the methods that it is made of, and of a loss other than the one that is trained."""
    options, constructor = component.options, METHODS[component.name]
    inner: dict[str, Any] = {
        name: [
            _resolve_method(f"{where}.{name}.{part.name}", part).model_dump()
            for part in _components(f"{where}.{name}", options.pop(name, None))
        ]
        for name in component_lists(constructor, Method)
    }
    if "loss" in options and "loss" in constructor_parameters(constructor):
        (loss,) = _components(f"{where}.loss", [options.pop("loss")])
        inner["loss"] = _resolve(f"{where}.loss", loss, _Catalogue("loss", catalogue("losses"))).model_dump()
    given = {"model", *inner} | ({"loss"} & constructor_parameters(constructor).keys())
    resolved = resolve_options(where, constructor, options, given=frozenset(given))
    return _with_options(component, resolved | inner)


def _components(where: str, value: Any) -> list[Component]:
    try:
        return TypeAdapter(list[Component]).validate_python(value)
    except ValidationError:
        raise UserError(
            f"{where} must be made of components such as [mas, {{name: lwf, strength: 3}}], got {value!r}"
        ) from None


class _Catalogue(dict[str, Callable[..., Any]]):
    """A dict whose missing key is a sentence."""

    def __init__(self, kind: str, components: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(components)
        self._kind = kind

    def __missing__(self, name: str) -> Callable[..., Any]:
        raise unknown_name(self._kind, name, self)


def _optimizers() -> _Catalogue:
    import torch

    optimizers = {
        name: value for name, value in vars(torch.optim).items() if isinstance(value, type) and name != "Optimizer"
    }
    return _Catalogue("optimizer", optimizers)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which as YAML 1.2 reads `1e-3` as a number, and `on`, `off`, `yes` and `no` as words."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as the class it is of has it)
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


def _read_yaml(path: Path) -> dict[str, Any]:
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


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one `key.path=value`; a list of components is entered by name or label."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"an override must look like key.path=value, got '{override}'")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise UserError(f"the value of the override '{override}' is not valid YAML") from None
    place: Any = raw
    for depth, key in enumerate(keys[:-1]):
        place = _enter(place, key, ".".join(keys[: depth + 1]))
    if not isinstance(place, dict):
        raise UserError(f"cannot set '{path}': {'.'.join(keys[:-1])} is a list; name one of its entries first")
    place[keys[-1]] = value


def _enter(place: Any, key: str, path: str) -> dict[str, Any] | list[Any]:
    if isinstance(place, list):
        names = [entry.get("label", entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in place]
        if key not in names:
            raise unknown_name(f"entry of {path.rpartition('.')[0]}", key, [str(name) for name in names])
        index: Any = names.index(key)
    else:
        index = key
        if place.get(key) is None:
            place[key] = {}
    entry = place[index]
    if isinstance(entry, str):
        entry = place[index] = {"name": entry}
    if not isinstance(entry, dict | list):
        raise UserError(f"cannot set a key inside '{path}': it is {entry!r}, not a section")
    return entry


def _readable(error: ValidationError) -> UserError:
    """The first mistake as one sentence."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    path = _path_names(first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_name("key", path, _keys_beside(first["loc"]))
    if first["type"] == "missing":
        return UserError(f"the config needs '{path}'")
    return UserError(f"{path}={first['input']!r} is not accepted: {first['msg'][0].lower()}{first['msg'][1:]}")


def _path_names(location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in location)


def _keys_beside(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"training": TrainingSection, "evaluation": EvaluationSection}
    section, prefix = sections.get(str(location[0]), Config), _path_names(location[:-1])
    return [f"{prefix}.{name}" if prefix else name for name in section.model_fields]
