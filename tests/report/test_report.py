import base64
import json
import re

import numpy as np
import pytest

from mas_embed import UserError
from mas_embed.report import (
    followed_tables,
    join_results,
    read_results,
    scores_figure,
    split_table,
    summary_table,
    write_report,
)


def run(method, seed, matrix, seconds=2.0):
    sequential = len(matrix) > 1
    measures = {
        "final_average": float(np.mean(matrix[-1])),
        "forgetting": matrix[0][0] - matrix[-1][0] if sequential else None,
        "backward_transfer": matrix[-1][0] - matrix[0][0] if sequential else None,
        "learning": float(np.mean(np.diag(matrix))) if sequential else None,
    }
    return {
        "method": method, "seed": seed, "options": {}, "scores": {"recall_at_1": matrix}, "initial": {"recall_at_1": [0.1, 0.1]},
        "all": {"recall_at_1": 0.5}, "measures": {"recall_at_1": measures},
        "seconds": {"training": seconds, "importance": 1.0, "evaluation": 9.0},
    }  # fmt: skip


@pytest.fixture
def results():
    runs = [
        run("a", 0, [[0.9, 0.1], [0.5, 0.7]]),
        run("joint", 0, [[0.8, 0.9]]),
        run("a", 1, [[0.7, 0.3], [0.5, 0.9]], seconds=4.0),
        run("joint", 1, [[0.8, 0.9]]),
    ]
    return {"schema": 1, "name": "two <splits>", "splits": ["x", "y"], "primary_metric": "recall_at_1", "runs": runs}


def test_the_table_by_hand(results):
    table = summary_table(results)
    assert table.title == "two <splits>: recall@1 over 2 splits, mean ± deviation of 2 seeds"
    # final averages .6 and .7: mean .65, sample deviation .0707; forgetting .4 and .2; seconds 3 and 5
    assert table.rows == [
        ["a", ".650 ± .071", ".300 ± .141", "-.300 ± .141", ".800 ± .000", "4.0 ± 1.4"],
        ["joint", ".850 ± .000", "-", "-", "-", "3.0 ± .0"],
    ]
    assert table.to_markdown().splitlines()[2].startswith("| a      | .650 ± .071")


def test_the_papers_table_by_hand(results):
    table = split_table(results)
    assert table.header == ["method", "x", "y", "all"]
    assert table.rows == [
        ["a", ".500 ± .000", ".800 ± .141", ".500 ± .000"],
        ["joint", ".800 ± .000", ".900 ± .000", ".500 ± .000"],
    ]


def test_what_was_followed_by_hand(results):
    assert followed_tables(results) == []
    for record, values in zip(results["runs"], ([0.9, 0.4], [0.8], [0.7, 0.6], [0.8]), strict=True):
        record["followed"] = {"cats": values}
    (table,) = followed_tables(results)
    assert table.title == "two <splits>: mAP of 'cats' after every split"
    assert table.header == ["method", "after x", "after y"]
    assert table.rows == [["a", ".800 ± .141", ".500 ± .141"], ["joint", "-", ".800 ± .000"]]


def test_one_seed_has_no_deviation(results):
    results["runs"] = results["runs"][:2]
    assert summary_table(results).rows[0][1] == ".600"
    assert summary_table(results).title.endswith("of 1 seed")


def test_the_figure_shows_every_method_and_split(results):
    figure = scores_figure(results)
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ["a", "joint", "split x", "split y"]
    heat_map = axes[0].images[0].get_array()
    np.testing.assert_allclose(heat_map, [[0.8, 0.2], [0.5, 0.8]])
    assert [text.get_text() for text in axes[0].texts] == ["0.80", "0.20", "0.50", "0.80"]
    np.testing.assert_allclose(axes[3].lines[0].get_ydata(), [0.2, 0.8])


def test_the_page_stands_alone(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text("name: <b>")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "two &lt;splits&gt;" in page
    assert "name: &lt;b&gt;" in page
    assert ".650 ± .071" in page
    picture = base64.b64decode(re.search('base64,([^"]+)', page).group(1))
    assert picture == (tmp_path / "scores.png").read_bytes()
    assert not re.search(r'(src|href)="http', page)


def test_no_results(results, tmp_path):
    with pytest.raises(UserError, match="name the directory of a run"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_results(tmp_path)
    for content in ("[]", "{}", '{"schema": 1, "runs": 3}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match="does not hold the results of a run"):
            read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results | {"runs": []}))
    with pytest.raises(UserError, match="no finished run"):
        write_report(tmp_path)


def test_several_runs_come_into_one_report(results, tmp_path):
    other = results | {
        "name": "other",
        "runs": [run("a", 0, [[0.9, 0.1], [0.5, 0.7]]), run("b", 0, [[0.9, 0.1], [0.2, 0.4]])],
    }
    for name, content in (("one", results), ("two", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="a report of several runs needs a directory of its own: give --out"):
        write_report(tmp_path / "one", tmp_path / "two")
    write_report(tmp_path / "one", tmp_path / "two", out=tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    assert not (tmp_path / "one" / "report.html").exists()
    rows = summary_table(join_results([tmp_path / "one", tmp_path / "two"])).rows
    assert [row[0] for row in rows] == ["a (one)", "joint", "a (two)", "b"]
    assert rows[3][1] == ".300"
    assert "a (two)" in page


def test_runs_over_other_splits_do_not_compare(results, tmp_path):
    for name, content in (("one", results), ("two", results | {"splits": ["x", "z"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"two has splits \['x', 'z'\], but .*one has \['x', 'y'\]; they do not compare"
    ):
        write_report(tmp_path / "one", tmp_path / "two", out=tmp_path / "both")


def test_runs_of_other_data_do_not_compare(results, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        (tmp_path / name / "config.yaml").write_text(f"data: {{name: folders, root: {name}}}")
    with pytest.raises(UserError, match="two is of other data than .*one"):
        write_report(tmp_path / "one", tmp_path / "two", out=tmp_path / "both")
