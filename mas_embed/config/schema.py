"""The sections of a config file, as pydantic models: what may be written, and every default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mas_embed.data import Normalize, PartName
from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.mistakes import accepted_by, not_accepted
from mas_embed.runtime.text import printable, shortened
from mas_embed.runtime.yaml_text import to_yaml
from mas_embed.training import CheckpointEvery, Precision, Recipe

PositiveCount = Annotated[StrictInt, Field(gt=0, le=2**31)]

_ALTERNATIVES = ("int", "str")  # how pydantic names the alternatives of a label at the end of a location

MOST_CANDIDATES = 1000  # of one method; each is trained with every seed


class Section(BaseModel):
    """A part of a config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SectionWithOptions(Section):
    """A section in which every key that is not one of its fields is an option of a constructor.

    `{name: mas, strength: 3}` and `{name: mas, options: {strength: 3}}` are the same. The second form is for an option that has
    the name of a field.
    """

    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("options", {}), dict):
            return value
        inline = {key: inner for key, inner in value.items() if key not in cls.model_fields}
        fields = {key: inner for key, inner in value.items() if key in cls.model_fields}
        return {**fields, "options": {**fields.get("options", {}), **inline}}

    @model_serializer(mode="wrap")
    def _inline_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        options = fields.pop("options")
        nested = {key: value for key, value in options.items() if key in type(self).model_fields}
        inline = {key: value for key, value in options.items() if key not in nested}
        fields = {key: value for key, value in fields.items() if value not in (None, "")}
        return {**fields, **inline, **({"options": nested} if nested else {})}


class Component(SectionWithOptions):
    """A component by name: `mas`, or `{name: mas, strength: 100}`; its options are those of its constructor."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def with_options(self, options: dict[str, Any]) -> Self:
        """The same component with other options."""
        return self.model_copy(update={"options": dict(options)})


class SelectSection(SectionWithOptions):
    """How options of a method are chosen: `select: {strength: [1, 10, 100]}`; each option has a list of candidates.

    Every candidate is trained on the same data and evaluated on its validation part, with seeds that the run does not use.
    """

    by: Literal["final_average", "backward_transfer", "learning"] = "final_average"
    on: Literal["validation"] = "validation"
    seeds: tuple[StrictInt, ...] = Field(default=(1000, 1001, 1002), min_length=1)
    num_splits: PositiveCount | None = None  # of the sequence's first; None: all

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _checked_seeds(seeds, "select.seeds")

    @model_validator(mode="after")
    def _has_candidates(self) -> SelectSection:
        if not self.options or not all(isinstance(values, list) and values for values in self.options.values()):
            raise UserError(
                "select must give a list of values for at least one option, as in {strength: [1, 10]}, got "
                f"{shortened(repr(self.options))}"
            )
        for name, values in self.options.items():
            if len({value if type(value) in (int, float) else repr(value) for value in values}) < len(values):
                raise UserError(f"select.{name} must be a list of different values, got {shortened(repr(values))}")
        number = math.prod(map(len, self.options.values()))
        if number > MOST_CANDIDATES:
            raise UserError(f"select must give at most {MOST_CANDIDATES:,} combinations of values, got {number:,}")
        return self


class SubsetSection(Section):
    """Items of the data that are used under a name; see `select_subset`."""

    split: str | None = None
    part: PartName = "train"
    labels: tuple[StrictInt | str, ...] | None = Field(default=None, min_length=1)

    @field_validator("split", mode="before")
    @classmethod
    def _is_a_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class ImportanceSection(Section):
    """What methods consolidate on after a split: "train", the items it was trained on; or a subset, without its labels."""

    data: str = "train"


class StartSection(Section):
    """The model before the first split: a pretrained or deployed one, and what it is protected on.

    `weights` is the file of a state dict of the whole model; None for the initial weights that the section `model` gives.
    `consolidate_on` names inputs without labels: a subset, or else a folder of images. `methods` lists the labels of the
    methods that consolidate on them; None for all.
    """

    weights: Annotated[str, Field(min_length=1)] | None = None
    consolidate_on: Annotated[str, Field(min_length=1)] | None = None
    methods: tuple[str, ...] | None = None


class MethodSection(Component):
    """A method. `label` names it in tables and folders, and must be given to two methods of one name.

    `importance` is the config's where it is left out.
    """

    label: str = Field(default="", pattern=r"^(\w[\w .()=,+-]*)?$", max_length=100)
    select: SelectSection | None = None
    importance: ImportanceSection | None = None

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class EvaluationSection(Component):
    """An evaluator, the metric that tables show first, and after which splits it evaluates which; see `SparseEvaluator`."""

    name: str = "retrieval"
    primary_metric: str = "mean_average_precision"
    every: PositiveCount = 1
    only_learned: bool = False


class TransformsSection(Section):
    """What is done to images: transforms that change those that are trained on at random, and how all are normalized.

    Without `normalize`, the colours that the model's weights want where it has such weights, and else unchanged ones.
    """

    augment: tuple[Component, ...] = ()
    normalize: Normalize | None = None


class CheckpointSection(Section):
    """How often a checkpoint is written within a split, see `CheckpointEvery`; null for a number that does not matter."""

    minutes: Annotated[float, Field(gt=0, strict=True)] | None = CheckpointEvery.minutes
    steps: PositiveCount | None = CheckpointEvery.steps


class ReportSection(Section):
    """What the report may show.

    `thumbnails: false` keeps pictures and texts of items out of the run directory and its report.
    """

    thumbnails: StrictBool = True


class TrainingSection(Section):
    """How a split is trained, see `Recipe`."""

    epochs: PositiveCount = Recipe.epochs
    batch_size: PositiveCount = Recipe.batch_size
    optimizer: Component = Component(name="Adam")
    scheduler: Component | None = None
    miner: Component | None = None
    sampler: Component | None = None
    num_workers: Annotated[StrictInt, Field(ge=0, le=1024)] = Recipe.num_workers
    clip_norm: Annotated[float, Field(gt=0, strict=True)] | None = Recipe.clip_norm
    accumulate: PositiveCount = Recipe.accumulate
    precision: Precision | None = Recipe.precision
    compile: StrictBool = Recipe.compile
    checkpoint_every: CheckpointSection = CheckpointSection()

    @field_validator("optimizer", mode="before")
    @classmethod
    def _is_adam_unless_named(cls, value: Any) -> Any:
        return {"name": "Adam", **value} if isinstance(value, dict) else value


class Config(Section):
    """A whole run: what `load_config` returns, with every default filled in."""

    name: str = Field(pattern=r"^[\w-]+$", max_length=100)
    seeds: tuple[StrictInt, ...] = Field(default=(0,), min_length=1)
    data: Component
    transforms: TransformsSection = TransformsSection()
    model: Component
    start: StartSection = StartSection()
    loss: Component
    methods: tuple[MethodSection, ...] = Field(min_length=1)
    subsets: dict[str, SubsetSection] = {}
    importance: ImportanceSection = ImportanceSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    callbacks: tuple[Component, ...] = ()
    report: ReportSection = ReportSection()

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _checked_seeds(seeds, "seeds")

    @model_validator(mode="after")
    def _titles_are_distinct(self) -> Config:
        titles = set()
        for method in self.methods:
            if method.title in titles:
                name = shortened(printable(method.title))
                raise UserError(f"there are two methods '{name}'; give each a label: {{name: {name}, label: ...}}")
            titles.add(method.title)
        return self

    @model_validator(mode="after")
    def _subsets_exist(self) -> Config:
        if "train" in self.subsets:
            raise UserError("a subset cannot be called 'train', which is what a split trains on; name it otherwise")
        for method in self.methods:
            if self.importance_of(method) not in ("train", *self.subsets):
                raise unknown_name("subset in importance.data", self.importance_of(method), ("train", *self.subsets))
        return self

    @model_validator(mode="after")
    def _methods_of_start_exist(self) -> Config:
        if self.start.methods is None:
            return self
        if self.start.consolidate_on is None:
            raise UserError("start.methods lists what consolidates on start.consolidate_on, which is missing")
        for title in self.start.methods:
            if title not in {method.title for method in self.methods}:
                raise unknown_name("method in start.methods", title, (method.title for method in self.methods))
        return self

    def consolidates_at_start(self, method: MethodSection) -> bool:
        """Whether a method consolidates before the first split."""
        methods = self.start.methods
        return self.start.consolidate_on is not None and (methods is None or method.title in methods)

    def importance_of(self, method: MethodSection) -> str:
        """What a method consolidates on: "train", or the name of a subset."""
        return (method.importance or self.importance).data

    def to_yaml(self) -> str:
        """The config as a file that `load_config` reads, every default filled in."""
        return to_yaml(self.model_dump(mode="json"))


def validate_config(raw: Any) -> Config:
    """A config from the content of a file.

    Raises:
        UserError: the first mistake as one sentence.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise _first_mistake(error) from None


def _first_mistake(error: ValidationError) -> UserError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    location = first["loc"]
    path = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        *parents, _ = location
        prefix = "".join(f"{parent}." for parent in parents)
        return unknown_name("key", path, [f"{prefix}{name}" for name in _section_at(parents).model_fields])
    if first["type"] == "missing":
        return UserError(f"the config needs '{path}'")
    if first["type"] == "invalid_key" or "[key]" in location:
        path = ".".join(str(key) for key in location if key != "[key]")
        return UserError(f"the key {shortened(printable(path))} is not accepted: it must be a text")
    if location and location[-1] in _ALTERNATIVES:
        location = location[:-1]
    alternatives = [one for one in error.errors() if one["loc"][: len(location)] == location]
    accepted = accepted_by({**one, "loc": one["loc"][len(location) :]} for one in alternatives)
    return not_accepted(".".join(map(str, location)), first["input"], accepted)


def _checked_seeds(seeds: tuple[int, ...], where: str) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"{where} must be different numbers from 0 to {2**32 - 1}, got {shortened(repr(list(seeds)))}")
    return seeds


def _section_at(path: Sequence[str | int]) -> type[Section]:
    """The section at a path of keys and list positions."""
    section: type[Section] = Config
    for key in path:
        if (
            isinstance(key, str) and key in section.model_fields
        ):  # else a position in a list, or a name that the user chose
            expected = section.model_fields[key].annotation
            section = next(kind for kind in (expected, *get_args(expected)) if _is_section(kind))
    return section


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
