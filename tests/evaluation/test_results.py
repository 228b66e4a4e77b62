"""`results.json`: what is written is read as the same, also what earlier versions wrote."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mas_embed import UserError
from mas_embed.evaluation import Results, RunRecord, join_results, read_results

STORED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("results.json"))


def record(method="a", seed=0, matrix=((0.9, 0.1), (0.5, 0.7)), **changes):
    return {
        "method": method, "seed": seed, "scores": {"recall_at_1": matrix}, "pooled": {"recall_at_1": 0.5},
        "measures": {"recall_at_1": {"final_average": 0.6, "forgetting": 0.4, "backward_transfer": -0.4, "learning": 0.8}},
        "seconds": {"training": 1.0, "importance": 0.5, "evaluation": 0.1}, **changes,
    }  # fmt: skip


SCORES = {"recall_at_1": 0.5}
UPDATE = {
    "after": "y", "old_on_old": SCORES, "new_on_new": SCORES, "new_on_old": SCORES, "compensated": {"none": SCORES}, "k": 3,
    "churn": 0.5, "drift": {"mean": 0.1, "quantiles": {"0.5": 0.1}}, "churn_re_embedded": 0.2, "verdict": "keep",
    "compensation": None, "reason": "so it is",
}  # fmt: skip


def content(*runs, **changes):
    return {
        "schema": 2, "name": "two", "splits": ["x", "y"], "primary_metric": "recall_at_1", "runs": list(runs), **changes,
    }  # fmt: skip


def write(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_what_is_written_is_read_as_the_same(tmp_path):
    details = [{"tracked": {"cats": 0.5}}, {"stale_gallery": {"recall_at_1": [0.4, None]}, "mine": {"answer": 42}}]
    results = Results.model_validate(content(record(matrix=[[0.9, None], [0.5, 0.7]], details=details)))
    results.write(tmp_path)
    assert read_results(tmp_path) == results
    raw = json.loads((tmp_path / "results.json").read_text())
    assert raw["schema"] == 2
    assert raw["runs"][0]["scores"]["recall_at_1"] == [[0.9, None], [0.5, 0.7]]
    assert raw["runs"][0]["details"][1]["mine"] == {"answer": 42}
    run = results.runs[0]
    np.testing.assert_array_equal(run.matrix("recall_at_1").scores, [[0.9, math.nan], [0.5, 0.7]])
    np.testing.assert_array_equal(run.stale_gallery_matrix("recall_at_1").scores, [[0.9, math.nan], [0.4, math.nan]])


def test_an_index_is_shown_by_a_metric_that_ranks_it():
    """The primary metric need not rank a gallery, as accuracy by class means does not."""
    two = {name: record()["scores"]["recall_at_1"] for name in ("recall_at_1", "mean_average_precision")}
    measures = dict.fromkeys(two, record()["measures"]["recall_at_1"])
    stale = [{}, {"stale_gallery": {"mean_average_precision": [0.1, 0.2]}}]
    other = Results.model_validate(content(record(scores=two, measures=measures, details=stale)))
    assert (other.primary_metric, other.index_metric) == ("recall_at_1", "mean_average_precision")
    same = Results.model_validate(content(record(details=[{}, {"stale_gallery": {"recall_at_1": [0.1, 0.2]}}])))
    assert same.index_metric == Results.model_validate(content(record())).index_metric == "recall_at_1"


def test_schema_1_in_the_words_of_schema_2(tmp_path):
    run = record()
    run["all"] = run.pop("pooled")
    run |= {
        "kept_bytes": 7, "followed": {"cats": [0.8, 0.6]}, "indexes": [UPDATE],
        "kept_gallery": {"scores": {"recall_at_1": [[0.9, 0.1], [0.3, 0.7]]}, "measures": {}},
    }  # fmt: skip
    (read,) = read_results(write(tmp_path / "run", content(run, schema=1))).runs
    assert (read.pooled, read.num_bytes) == ({"recall_at_1": 0.5}, 7)
    assert [found.tracked for found in read.details] == [{"cats": 0.8}, {"cats": 0.6}]
    assert read.stale_gallery_matrix("recall_at_1").final_average == pytest.approx(0.5)
    assert [found.after for found in read.index_updates] == ["y"]
    assert read.details[0].index_update is None


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.parent.relative_to(path.parents[3])))
def test_every_stored_result_is_read(path):
    raw, results = json.loads(path.read_text()), read_results(path.parent)
    assert [run.method for run in results.runs] == [run["method"] for run in raw["runs"]]
    for run, stored in zip(results.runs, raw["runs"], strict=True):
        for metric, measures in run.measures.items():
            computed = run.matrix(metric)
            for name in ("final_average", "forgetting", "backward_transfer", "learning"):
                value = getattr(computed, name)
                assert measures[name] == (None if math.isnan(value) else pytest.approx(value))
        if raw["schema"] == 1 and (stale := stored.get("kept_gallery", {}).get("scores")):
            metric = raw["primary_metric"]
            np.testing.assert_array_equal(run.stale_gallery_matrix(metric).scores, stale[metric])
            assert len(run.index_updates) == len(stored["indexes"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not hold the results of a run"),
        ("3", "does not hold the results of a run"),
        ("{}", "does not hold the results of a run: it has no schema number"),
        (content(schema="2"), "it has no schema number"),
        (content(schema=True), "it has no schema number"),
        (content(schema=0), "it has no schema number"),
        (content(splits=[]), "there is no split"),
        (content(record(), record()), "two runs of a with seed 0 do not fit together"),
        (content(record(), record(seed=1, matrix=[[0.1, 0.2]])), "two runs of a with seed . do not fit together"),
        (content(record(method="")), "a run has no name"),
        (content(record(num_steps=-1)), "runs.0.num_steps: it must be a number of at least 0"),
        (content(record(pooled={})), "lacks the pooled of recall_at_1"),
        (content(record(measures={})), "lacks the measures of recall_at_1"),
        (content(record(measures={"recall_at_1": {"learning": 1}})), "lacks one of the measures"),
        (content(record(seconds={"training": 1})), "lacks the seconds of training or importance"),
        (content(record(seconds={"training": -1, "importance": 1})), "runs.0.seconds.training"),
        (content(record(initial={"recall_at_1": [0.5]})), "the initial scores of a are not of 2 splits"),
        (content(record(details=[{}])), "has details of 1 evaluations, not of 2"),
        (content(record(details=[{}, {"stale_gallery": {"mrr": [0.1, 0.2]}}])), "of its stale gallery"),
        (content(record(details=[{}, {"stale_gallery": {"recall_at_1": [0.1] * 3}}])), "of too many splits"),
        (
            content(record(details=[{}, {"index_update": UPDATE | {"compensated": {"none": {}}}}])),
            "of an update of the index",
        ),
        (
            content(record(details=[{}, {"stale_gallery": {"mean_average_precision": [0.1, 0.2]}}])),
            "lacks the scores or measures of mean_average_precision",
        ),
        (content(record(pooled={"recall_at_1": math.inf})), "runs.0.pooled.recall_at_1"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"schema": 2, "name": ' + "1" * 5000 + "}", "is not valid JSON"),
        (content(schema=3), r"was written by a newer version of mas-embed \(schema 3\); update mas-embed"),
        (content(schema=1, runs=3), "does not hold the results of a run"),
        (content(schema=1, runs=[{}]), "does not hold the results of a run"),
        (content(record(scores={})), "lacks the scores of recall_at_1"),
        (content(record(matrix=[[1.0, 2.0]] * 3)), "are no matrix of 2 splits"),
        (content(record(matrix=[[1.0], [2.0, 3.0]])), "are no matrix of 2 splits"),
        (content(record(matrix=[["high", 1.0]])), "runs.0.scores.recall_at_1.0.0: .* must be a number"),
    ],
)
def test_a_damaged_or_newer_file_is_refused_in_a_sentence(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as caught:
        read_results(write(tmp_path / "run", values))
    assert "\n" not in str(caught.value)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(UserError, match="there is no .*results.json; name the directory of a run"):
        read_results(tmp_path)


def test_several_results_are_joined_and_methods_of_one_name_told_apart():
    one = Results.model_validate(content(record("a"), record("joint", matrix=[[0.8, 0.9]])))
    two = Results.model_validate(content(record("a"), record("b"), name="other"))
    joined = join_results({"runs/one": one, "runs/two": two})
    assert joined.methods == ["a (one)", "joint", "a (two)", "b"]
    assert joined.name == "two and other"
    before = copy.deepcopy(one)
    joined.runs.clear()
    assert one == before
    other_splits = Results.model_validate(content(splits=["x", "z"]))
    with pytest.raises(
        UserError, match=r"two has splits \['x', 'z'\], but .*one has \['x', 'y'\]; they do not compare"
    ):
        join_results({"one": one, "two": other_splits})


def test_methods_and_matrices_in_the_order_of_training():
    results = Results.model_validate(content(record("b"), record("a"), record("b", 1, ((0.7, 0.3), (0.1, 0.9)))))
    assert results.methods == ["b", "a"]
    assert results.matrices("b").shape == (2, 2, 2)
    assert [run.seed for run in results.runs_of("b")] == [0, 1]
    assert isinstance(results.runs[0], RunRecord)
