import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from mas_embed import ScoreMatrix, SequenceResult, UserError


def result(**changes):
    matrices = {"recall_at_1": [[0.9, 0.1], [0.5, 0.7]], "r_precision": [[0.8, 0.2], [0.4, 0.6]]}
    fields = {
        "splits": ["cats", "dogs"],
        "scores": {name: ScoreMatrix(rows) for name, rows in matrices.items()},
        "initial": {"recall_at_1": [0.1, 0.3], "r_precision": [0.0, 0.0]},
        "pooled": {"recall_at_1": 0.55, "r_precision": 0.45},
        "details": [{}, {}],
        "num_steps": 20,
        "seconds": {"training": 2.0, "importance": 1.0, "evaluation": 0.5},
        "method": "MAS",
    }
    return SequenceResult(**{**fields, **changes})


def test_the_summary_is_what_is_printed():
    text = repr(result())
    assert text == result().summary()
    assert text.splitlines()[0] == "2 splits, 20 batches, training 2.0 s, importance 1.0 s, evaluation 0.5 s"
    assert re.search(r"recall_at_1 +0\.600 +0\.400 +0\.800", text)  # (.5 + .7) / 2, .9 - .5, (.9 + .7) / 2


@pytest.mark.parametrize(("metric", "values"), [(None, [0.9, 0.1, 0.5, 0.7]), ("r_precision", [0.8, 0.2, 0.4, 0.6])])
def test_the_figure_shows_the_matrix_and_the_score_of_each_split(metric, values):
    figure = result().plot(metric)
    assert isinstance(figure, Figure)
    matrix, first, second = (axis for axis in figure.axes if axis.get_title())
    assert matrix.get_title() == "MAS"
    cells = [text.get_text() for text in matrix.texts]
    assert [float(cell) for cell in cells[:4]] == values and cells[4:] == ["▼.40"]  # the fall of the first split
    np.testing.assert_allclose(first.lines[0].get_ydata(), values[::2])
    np.testing.assert_allclose(second.lines[0].get_ydata(), values[1::2])


def test_the_page_needs_no_other_file_and_shows_what_the_result_holds(tmp_path):
    result().report(tmp_path / "page.html", name="pets & co")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"<h1>.*pets &amp; co</h1>", page)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    summary = page.split("<table>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row".*?>(.*?)</th>', summary) == ["MAS"]
    assert re.findall(r"<td.*?>(.*?)</td>", summary) == [".600", ".400", "\u2212.400", ".800", "3.0"]
    result(method="EWC").report(str(tmp_path / "page.html"), metric="r_precision")
    assert "R-precision" in (tmp_path / "page.html").read_text().split("</table>")[0]


def test_the_record_holds_what_results_json_holds():
    record = result(num_bytes=7, keeps="data", seed=3).as_record({"options": {"strength": 2.0}, "method": "strong"})
    assert (record.method, record.seed, record.keeps, record.num_bytes) == ("strong", 3, "data", 7)
    assert record.options == {"strength": 2.0}
    assert record.measures["recall_at_1"]["forgetting"] == pytest.approx(0.4)
    assert record.measures["recall_at_1"]["forward_transfer"] == pytest.approx(0.1 - 0.3)
    assert record.num_averaged["learning"] == 2


def test_joint_training_and_scores_that_were_not_measured(tmp_path):
    joint = result(scores={"recall_at_1": ScoreMatrix([[0.6, 0.8]])}, details=[{}])
    joint.report(tmp_path / "joint.html")
    assert ".700" in (tmp_path / "joint.html").read_text()
    sparse = result(scores={"recall_at_1": ScoreMatrix([[np.nan, np.nan], [0.5, 0.7]])})
    assert [text.get_text() for text in sparse.plot().axes[0].texts] == [".50", ".70"]


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown metric 'recall_at_2': did you mean 'recall_at_1'"):
        result().plot("recall_at_2")
    with pytest.raises(UserError, match="the result has no scores to show"):
        result(scores={}).report(tmp_path / "page.html")
    with pytest.raises(UserError, match="the folder .*nowhere does not exist"):
        result().report(tmp_path / "nowhere" / "page.html")
