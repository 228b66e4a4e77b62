"""What `results.json` holds: a record for every method and seed, written by an experiment and read by the report. S splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mas_embed.errors import UserError
from mas_embed.evaluation.score_matrix import MEASURES, ScoreMatrix
from mas_embed.retrieval import IndexUpdate
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.json_text import json_text
from mas_embed.runtime.mistakes import accepted_by
from mas_embed.runtime.reading import read_json
from mas_embed.runtime.text import shortened

SCHEMA = 2
RANKING_METRIC = "mean_average_precision"  # shown of an index where the primary metric ranks no gallery

# The files of a run directory that its report is made of
RESULTS_FILE = "results.json"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"

Finite = Annotated[float, Field(ge=-1e100, le=1e100)]  # so that means and deviations are finite, too
Score = Finite | None  # None for one that was not measured
Count = Annotated[int, Field(ge=0, le=2**63)]
Matrix = list[list[Score]]


class Details(BaseModel):
    """What an evaluator found after one split, beside the scores; see `RetrievalDetails` and `TrackedDetails`.

    An evaluator may have others, which are kept as they are.
    """

    model_config = ConfigDict(extra="allow")

    stale_gallery: dict[str, list[Score]] | None = None
    index_update: IndexUpdate | None = None
    tracked: dict[str, Finite] = {}
    own_gallery: dict[str, list[Score]] | None = None
    all_galleries: dict[str, list[Score]] | None = None

    @property
    def scores_of_index(self) -> list[dict[str, list[Score]] | dict[str, float]]:
        """All scores of the stale gallery and of the update of the index, by metric; empty without them."""
        stale, update = self.stale_gallery, self.index_update
        scores: list[dict[str, list[Score]] | dict[str, float]] = [stale] if stale else []
        if update is not None:
            scores += [update.old_on_old, update.new_on_new, update.new_on_old, *update.compensated.values()]
        return scores

    def check(self, metric: str, num_splits: int, where: str) -> None:
        """Raises `ValueError` unless all scores of an index have the metric."""
        if any(metric not in scores for scores in self.scores_of_index):
            raise ValueError(f"{where} lacks the {metric} of its stale gallery, or of an update of the index")
        for name in ("stale_gallery", "own_gallery", "all_galleries"):
            if any(len(row) > num_splits for row in (getattr(self, name) or {}).values()):
                raise ValueError(f"{where} has a {name.replace('_', ' ')} of too many splits")


class OwnAndAll(NamedTuple):
    """The scores of the same queries among the items of their own split, and among those of all splits.

    A split is forgotten if it falls in `own`; it is confused with others if it falls in `all` alone.
    """

    own: ScoreMatrix
    all: ScoreMatrix


class RunRecord(BaseModel):
    """One method with one seed.

    Attributes:
        method: its title in the config.
        seed: of the training.
        folder: of the training inside the run directory; "" in the files of earlier versions, and outside of a run directory.
        options: of the method.
        importance_data: what the method consolidated on: "train", or the name of a subset.
        keeps: what the method stores of the data, see `Method.keeps`.
        num_bytes: the memory of everything that the method remembered in the end.
        num_steps: batches that were trained on.
        num_learned: the number of splits that were learned; None for all. It is less than S if further splits were appended to
            the run, which the method has not learned yet.
        missing: the names of the splits that were not evaluated in the end, because their data was gone.
        scores: by metric the score matrix [S, S], or [1, S] for a method that joins the splits.
        initial: by metric the scores [S] before the first split.
        pooled: by metric one score over the items of all splits together, after the last.
        measures: by metric the measures of the score matrix, see `ScoreMatrix`; None where one is not defined.
        num_averaged: by measure over how many splits its mean was taken.
        details: the evaluator's further findings, after every split.
        seconds: wall time of "training", "importance" and "evaluation".
    """

    method: str
    seed: int
    folder: str = ""
    options: dict[str, Any] = {}
    importance_data: str = "train"
    keeps: str = "nothing"
    num_bytes: Count = 0
    num_steps: Count = 0
    num_learned: Count | None = None
    missing: list[str] = []
    scores: dict[str, Matrix]
    initial: dict[str, list[Score]] = {}
    pooled: dict[str, Score]
    measures: dict[str, dict[str, Score]]
    num_averaged: dict[str, int] = {}
    details: list[Details] = []
    seconds: dict[str, Annotated[float, Field(ge=0, le=1e100)]]

    def check(self, splits: list[str], primary_metric: str, index_metric: str) -> None:
        """Raises `ValueError` unless everything that tables and figures show is there, and of one size."""
        where, num_splits = f"the run {self.method} with seed {self.seed}", len(splits)
        if not self.method:
            raise ValueError("a run has no name")
        for name, table in (("scores", self.scores), ("pooled", self.pooled), ("measures", self.measures)):
            if primary_metric not in table:
                raise ValueError(f"{where} lacks the {name} of {primary_metric}")
        if any(measure not in self.measures[primary_metric] for measure in MEASURES):
            raise ValueError(f"{where} lacks one of the measures {', '.join(MEASURES)}")
        if not {"training", "importance"} <= self.seconds.keys():
            raise ValueError(f"{where} lacks the seconds of training or importance")
        num_rows = len(self.scores[primary_metric])
        for metric, matrix in self.scores.items():
            shape = [len(matrix), *{len(row) for row in matrix}]
            if num_rows not in (1, num_splits) or shape != [num_rows, num_splits]:
                raise ValueError(f"the scores {metric} of {self.method} are no matrix of {num_splits} splits")
        if any(len(scores) != num_splits for scores in self.initial.values()):
            raise ValueError(f"the initial scores of {self.method} are not of {num_splits} splits")
        if len(self.details) not in (0, num_rows):
            raise ValueError(f"{where} has details of {len(self.details)} evaluations, not of {num_rows}")
        for found in self.details:
            found.check(index_metric, num_splits, where)
        if any(found.scores_of_index for found in self.details):
            measures = self.measures.get(index_metric, {})
            if index_metric not in self.scores or any(measure not in measures for measure in MEASURES):
                raise ValueError(f"{where} lacks the scores or measures of {index_metric}")

    def extended(self, num_splits: int, *, is_joined: bool = False) -> RunRecord:
        """The record in a sequence to which splits were appended, of which nothing was measured; its measures stay."""
        matrix = next(iter(self.scores.values()))
        num_before = len(matrix[0])
        new_rows = num_splits - num_before if len(matrix) == num_before and not is_joined else 0
        unmeasured: list[Score] = [None] * num_splits
        return self.model_copy(
            update={
                "num_learned": num_before if self.num_learned is None else self.num_learned,
                "scores": {
                    metric: [*([*row, *unmeasured[num_before:]] for row in matrix), *[list(unmeasured)] * new_rows]
                    for metric, matrix in self.scores.items()
                },
                "initial": {metric: [*row, *unmeasured[num_before:]] for metric, row in self.initial.items()},
                "details": [*self.details, *[Details()] * new_rows] if self.details else [],
            }
        )

    def matrix(self, metric: str) -> ScoreMatrix:
        """The score matrix of a metric."""
        return ScoreMatrix(np.array(self.scores[metric], dtype=np.float64))

    def stale_gallery_matrix(self, metric: str) -> ScoreMatrix | None:
        """The score matrix of a metric with a gallery that is never embedded again; None where that was not measured.

        Until a vector is older than the model, as after the first split, its scores are those of the fresh gallery.
        """
        fresh = self.scores[metric]
        rows = [(found.stale_gallery or {}).get(metric) for found in self.details]
        return _matrix([row or fresh[i] for i, row in enumerate(rows)], len(fresh[0])) if any(rows) else None

    def own_and_all(self, metric: str) -> OwnAndAll | None:
        """The score matrices of a metric among the items of each split alone, and among those of all; None if not recorded."""
        for name in ("own_gallery", "all_galleries") if metric in self.scores else ():
            rows = [(getattr(found, name) or {}).get(metric) for found in self.details]
            if any(rows):
                other = self.matrix(metric)
                recorded = _matrix([row or [] for row in rows], other.scores.shape[1])
                return OwnAndAll(recorded, other) if name == "own_gallery" else OwnAndAll(other, recorded)
        return None

    @property
    def index_updates(self) -> list[IndexUpdate]:
        """What every update did to the index that was made before it."""
        return [found.index_update for found in self.details if found.index_update is not None]


def _matrix(rows: Matrix, num_splits: int) -> ScoreMatrix:
    """Rows as a score matrix; a row is shorter where the last splits were not evaluated."""
    missing: list[float | None] = [None] * num_splits
    return ScoreMatrix(np.array([[*row, *missing][:num_splits] for row in rows], dtype=np.float64))


class Candidate(BaseModel):
    """Options of a method that were tried.

    Attributes:
        options: the values that were tried.
        seeds: of the trainings.
        values: the measure of every training that ended.
        mean: of the values; None if a training failed.
        error: what the failed training said; None if none failed.
        seconds: wall time of all trainings.
    """

    options: dict[str, Any]
    seeds: list[int]
    values: list[Finite]
    mean: Score
    error: str | None = None
    seconds: Finite


class Selection(BaseModel):
    """How the options of a method were chosen.

    Attributes:
        candidates: that were tried so far.
        by: the measure that decided.
        on: the part of the data that decided.
        chosen: the options of the best candidate; None until all were tried.
    """

    candidates: list[Candidate] = []
    by: str | None = None
    on: str | None = None
    chosen: dict[str, Any] | None = None


class Results(BaseModel):
    """What a run directory's `results.json` holds.

    Attributes:
        schema_number: of the file's layout.
        name: of the config.
        splits: their names, [S].
        primary_metric: the metric that tables show first.
        runs: a record for every method and seed that has ended.
        selections: by method how its options were chosen.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_number: int = Field(default=SCHEMA, alias="schema")
    name: str
    splits: list[str]
    primary_metric: str
    runs: list[RunRecord] = []
    selections: dict[str, Selection] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.splits or not all(self.splits):
            raise ValueError("there is no split, or one without a name")
        for run in self.runs:
            run.check(self.splits, self.primary_metric, self.index_metric)
        seeds = Counter((run.method, run.seed) for run in self.runs)
        shapes = {run.method: len(run.scores[self.primary_metric]) for run in self.runs}
        for run in self.runs:
            if seeds[run.method, run.seed] > 1 or shapes[run.method] != len(run.scores[self.primary_metric]):
                raise ValueError(f"two runs of {run.method} with seed {run.seed} do not fit together")
        return self

    @property
    def index_metric(self) -> str:
        """The metric that is shown of an index: the primary one, or mean average precision where that ranks no gallery."""
        of_indexes = [scores for run in self.runs for found in run.details for scores in found.scores_of_index]
        is_ranking = not of_indexes or any(self.primary_metric in scores for scores in of_indexes)
        return self.primary_metric if is_ranking else RANKING_METRIC

    @property
    def methods(self) -> list[str]:
        """The methods in the order in which they were trained first."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def runs_of(self, method: str) -> list[RunRecord]:
        """The records of a method, one for each seed."""
        return [run for run in self.runs if run.method == method]

    def matrices(self, method: str, metric: str | None = None) -> NDArray[np.float64]:
        """The score matrices [seeds, rows, S] of a method, of the primary metric unless another is named."""
        return np.array([run.matrix(metric or self.primary_metric).scores for run in self.runs_of(method)])

    def extended(self, splits: Sequence[str], *, joined: Collection[str] = ()) -> Results:
        """The results with further splits appended to theirs, of which nothing was measured; equal if there are none.

        Args:
            splits: the names of all splits.
            joined: the methods that join all splits, and have one row of scores.
        """
        if len(splits) == len(self.splits):
            return self
        runs = [run.extended(len(splits), is_joined=run.method in joined) for run in self.runs]
        return self.model_copy(update={"splits": list(splits), "runs": runs})

    def write(self, folder: Path) -> None:
        """Writes the file into a folder, atomically."""
        write_file(folder / RESULTS_FILE, json_text(self.model_dump(mode="json", by_alias=True), indent=1) + "\n")


def read_results(folder: str | Path) -> Results:
    """Reads the results in a run directory, also those that earlier versions wrote.

    Raises:
        UserError: there is no such file, it is damaged, or a newer version wrote it.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise UserError(f"there is no {path}; name the directory of a run")
    raw = read_json(path, "the results")
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UserError(f"{path} does not hold the results of a run: it has no schema number")
    if schema > SCHEMA:
        raise UserError(
            f"{path} was written by a newer version of mas-embed (schema {schema}); update mas-embed to read it"
        )
    try:
        return Results.model_validate(_as_schema_2(raw) if schema == 1 else raw)
    except ValidationError as error:
        raise UserError(f"{path} does not hold the results of a run ({first_mistake(error)})") from None
    except (AttributeError, KeyError, TypeError, IndexError, StopIteration, ValueError):
        raise UserError(f"{path} does not hold the results of a run") from None


def first_mistake(error: ValidationError) -> str:
    """The first mistake that was found in a record or in results, as a part of a sentence."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # from a check of this module
        return shortened(first["msg"].removeprefix("Value error, "))
    if first["type"] == "missing":
        return shortened(f"'{where}' is missing")
    first["loc"] = ()  # the sentence is about the value itself
    return shortened(f"{where}: {accepted_by([first])}")


def join_results(results: Mapping[str, Results]) -> Results:
    """The results of several runs, by name, as those of one; a method that two of them have is named with its run.

    Raises:
        UserError: the runs do not have the same splits, or not the same primary metric.
    """
    (first_name, first), *_ = results.items()
    for name, one in results.items():
        for key in ("splits", "primary_metric"):
            if getattr(one, key) != getattr(first, key):
                raise UserError(
                    f"{name} has {key} {getattr(one, key)}, but {first_name} has {getattr(first, key)}; they do not compare"
                )
    counts = Counter(method for one in results.values() for method in one.methods)
    runs: list[RunRecord] = []
    selections: dict[str, Selection] = {}
    for name, one in results.items():
        titles = {method: method if counts[method] == 1 else f"{method} ({Path(name).name})" for method in one.methods}
        runs += [run.model_copy(update={"method": titles[run.method]}) for run in one.runs]
        selections |= {titles[method]: found for method, found in one.selections.items() if method in titles}
    joined_name = " and ".join(dict.fromkeys(one.name for one in results.values()))
    return first.model_copy(update={"name": joined_name, "runs": runs, "selections": selections})


def _as_schema_2(raw: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of schema 1 in the layout of schema 2."""
    return {**raw, "schema": SCHEMA, "runs": [_run_as_schema_2(run) for run in raw["runs"]]}


def _run_as_schema_2(run: dict[str, Any]) -> dict[str, Any]:
    stale = run.get("kept_gallery", {}).get("scores", {})
    updates = dict(enumerate(run.get("indexes", []), start=1))  # there is none after the first split
    tracked = run.get("followed", {})
    num_rows = len(next(iter(run["scores"].values())))
    details = [
        {
            "stale_gallery": {metric: matrix[row] for metric, matrix in stale.items()} or None,
            "index_update": updates.get(row),
            "tracked": {name: values[row] for name, values in tracked.items()},
        }
        for row in range(num_rows)
    ]
    renamed = {"all": "pooled", "kept_bytes": "num_bytes"}
    dropped = {"kept_gallery", "indexes", "followed"}
    content = {renamed.get(key, key): value for key, value in run.items() if key not in dropped}
    return {**content, "details": details}
