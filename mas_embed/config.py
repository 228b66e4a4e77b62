"""A whole run as one YAML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from mas_embed.data import DATASETS, PartName
from mas_embed.errors import UserError, unknown_name
from mas_embed.losses import FactLoss, catalogue
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS
from mas_embed.options import component_lists, constructor_parameters, resolve_options
from mas_embed.retrieval import Distance
from mas_embed.retrieval.facts import FactDistance
from mas_embed.selection import candidates_of
from mas_embed.training import FACT_METRICS, per_class_sampler
from mas_embed.yaml_file import apply_override, read_yaml

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


class SubsetSection(_Section):
    """Items of the data that are used under a name; see `select_subset`."""

    split: str | None = None
    part: PartName = "train"
    labels: tuple[StrictInt | str, ...] | None = Field(default=None, min_length=1)

    @field_validator("split", mode="before")
    @classmethod
    def _is_a_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class ImportanceSection(_Section):
    """What methods consolidate on after a split: "train", what the split trained on; or a subset, without its labels."""

    data: str = "train"


class MethodComponent(Component):
    """A method; `label` tells two of one name apart, in tables and folders; `select` chooses options of it.

    `importance` is the config's where it is left out.
    """

    label: str = Field(default="", pattern=r"^(\w[\w .()=,+-]*)?$", max_length=100)
    select: SelectSection | None = None
    importance: ImportanceSection | None = None

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class TrainingSection(_Section):
    """How a split is trained."""

    epochs: PositiveCount = 20
    batch_size: PositiveCount = 64
    optimizer: Component = Component(name="Adam")
    scheduler: Component | None = None
    miner: Component | None = None
    sampler: Component | None = None

    @field_validator("optimizer", mode="before")
    @classmethod
    def _is_adam_unless_named(cls, value: Any) -> Any:
        return {"name": "Adam", **value} if isinstance(value, dict) else value


class RetrievalEvaluation(_Section):
    """A split is judged by what its queries find: items of their own label."""

    name: Literal["retrieval"] = "retrieval"
    distance: Distance = "cosine"
    recall_at: tuple[PositiveCount, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    watch_index: bool = True
    primary_metric: str = "mean_average_precision"

    @model_validator(mode="after")
    def _is_measured(self) -> RetrievalEvaluation:
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


class FactEvaluation(_Section):
    """A split is judged by how well its facts and images find each other; see `FactJudge`."""

    name: Literal["facts"]
    distance: FactDistance = "cosine"
    follow: tuple[str, ...] = ()
    primary_metric: str = "mean_average_precision"

    @field_validator("primary_metric")
    @classmethod
    def _is_measured(cls, value: str) -> str:
        if value not in FACT_METRICS:
            raise unknown_name("evaluation.primary_metric", value, FACT_METRICS)
        return value


EVALUATIONS: dict[str, type[RetrievalEvaluation] | type[FactEvaluation]] = {
    "retrieval": RetrievalEvaluation,
    "facts": FactEvaluation,
}


def _is_retrieval_unless_named(value: Any) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        return value
    name = value.get("name", "retrieval")
    if name not in EVALUATIONS:
        raise unknown_name("evaluation", name, EVALUATIONS)
    return {**value, "name": name}


Evaluation = Annotated[
    RetrievalEvaluation | FactEvaluation, Field(discriminator="name"), BeforeValidator(_is_retrieval_unless_named)
]


class Config(_Section):
    """A whole run: what `load_config` returns, with every default filled in."""

    name: str = Field(pattern=r"^[\w-]+$", max_length=100)
    seeds: tuple[StrictInt, ...] = Field(default=(0,), min_length=1)
    data: Component
    model: Component
    loss: Component
    methods: tuple[MethodComponent, ...] = Field(min_length=1)
    subsets: dict[str, SubsetSection] = {}
    importance: ImportanceSection = ImportanceSection()
    training: TrainingSection = TrainingSection()
    evaluation: Evaluation = RetrievalEvaluation()

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

    @model_validator(mode="after")
    def _subsets_are_there(self) -> Config:
        if "train" in self.subsets:
            raise UserError("a subset cannot be called 'train', which is what a split trains on; name it otherwise")
        for method in self.methods:
            if self.importance_of(method) not in ("train", *self.subsets):
                raise unknown_name("subset in importance.data", self.importance_of(method), ("train", *self.subsets))
        for name in self.evaluation.follow if isinstance(self.evaluation, FactEvaluation) else ():
            if name not in self.subsets:
                raise unknown_name("subset in evaluation.follow", name, self.subsets)
        return self

    def importance_of(self, method: MethodComponent) -> str:
        """What a method consolidates on: "train", or the name of a subset."""
        return (method.importance or self.importance).data

    def to_yaml(self) -> str:
        """The config as a file that `load_config` reads, every default filled in."""
        plain = self.model_dump(mode="json")
        for entry in plain["methods"]:
            for key in ("label", "select", "importance"):
                if not entry[key]:
                    del entry[key]
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
    raw = read_yaml(Path(path))
    for override in overrides:
        apply_override(raw, override)
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
            # The size of a word vector is that of the data
            "model": _resolve("model", config.model, MODELS, given={"vector_size"}),
            "loss": _resolve_loss("loss", config.loss),
            "methods": tuple(_resolve_method(f"methods.{method.title}", method) for method in config.methods),
            "training": training.model_copy(
                update={
                    "optimizer": _resolve("training.optimizer", training.optimizer, _optimizers(), given={"params"}),
                    "scheduler": _resolve("training.scheduler", training.scheduler, _schedulers(), given={"optimizer"}),
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
    fixed = {name: getattr(component, name) for name in type(component).model_fields}
    return type(component).model_validate({**fixed, **options})


def with_candidate(method: MethodComponent, candidate: Mapping[str, Any], where: str | None = None) -> MethodComponent:
    """The method with the options of a candidate, checked as if the config had them.

    Raises:
        UserError: an option that the method does not take, or a value that it does not accept.
    """
    fixed = {"name": method.name, "label": method.label, "importance": method.importance}
    chosen = MethodComponent.model_validate({**fixed, **method.options, **candidate})
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


def _resolve_loss(where: str, component: Component) -> Any:
    """A loss of pytorch-metric-learning, or "facts", to whom the data gives the table of facts."""
    if component.name == "facts":
        return _resolve(where, component, {"facts": FactLoss}, given={"vectors", "weights"})
    return _resolve(where, component, _Catalogue("loss", {"facts": FactLoss, **catalogue("losses")}))


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
        inner["loss"] = _resolve_loss(f"{where}.loss", loss).model_dump()
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

    return _Catalogue("optimizer", _subclasses(torch.optim, torch.optim.Optimizer))


def _schedulers() -> _Catalogue:
    from torch.optim import lr_scheduler

    return _Catalogue("scheduler", _subclasses(lr_scheduler, lr_scheduler.LRScheduler))


def _subclasses(module: ModuleType, base: type) -> dict[str, Callable[..., Any]]:
    """The public classes of a module that are of a kind, by name, without the kind itself."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}
    return {name: value for name, value in found.items() if value is not base and not name.startswith("_")}


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
    """A place in the config as it is written; pydantic puts the kind of evaluation between its section and its keys."""
    return ".".join(str(part) for depth, part in enumerate(location) if (location[0], depth) != ("evaluation", 1))


def _keys_beside(location: Sequence[str | int]) -> list[str]:
    section, prefix = _section_at(location[:-1]), _path_names(location[:-1]) if len(location) > 1 else ""
    return [f"{prefix}.{name}" if prefix else name for name in section.model_fields]


def _section_at(location: Sequence[str | int]) -> type[BaseModel]:
    if not location:
        return Config
    if location[0] == "evaluation":
        return EVALUATIONS[str(location[1])]
    if location[0] == "subsets":
        return SubsetSection
    return ImportanceSection if location[-1] == "importance" else TrainingSection
