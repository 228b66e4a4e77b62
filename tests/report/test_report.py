import json
import re
from io import StringIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from mas_embed import UserError
from mas_embed.evaluation import Results
from mas_embed.report import (
    Table,
    index_table,
    metric_name,
    scores_figure,
    split_table,
    stale_gallery_figure,
    summary_table,
    terminal_table,
    tracked_tables,
    unseen_table,
    write_report,
)
from mas_embed.report.drawing import drawn, png_of


def run(method, seed, matrix, seconds=2.0):
    sequential = len(matrix) > 1
    measures = {
        "final_average": float(np.mean(matrix[-1])),
        "forgetting": matrix[0][0] - matrix[-1][0] if sequential else None,
        "backward_transfer": matrix[-1][0] - matrix[0][0] if sequential else None,
        "learning": float(np.mean(np.diag(matrix))) if sequential else None,
    }
    return {
        "method": method, "seed": seed, "scores": {"recall_at_1": matrix}, "initial": {"recall_at_1": [0.1, 0.1]},
        "pooled": {"recall_at_1": 0.5}, "measures": {"recall_at_1": measures}, "details": [{} for _ in matrix],
        "seconds": {"training": seconds, "importance": 1.0, "evaluation": 9.0},
    }  # fmt: skip


@pytest.fixture
def content():
    runs = [
        run("a", 0, [[0.9, 0.1], [0.5, 0.7]]),
        run("joint", 0, [[0.8, 0.9]]),
        run("a", 1, [[0.7, 0.3], [0.5, 0.9]], seconds=4.0),
        run("joint", 1, [[0.8, 0.9]]),
    ]
    return {"schema": 2, "name": "two <splits>", "splits": ["x", "y"], "primary_metric": "recall_at_1", "runs": runs}


@pytest.fixture
def results(content):
    return Results.model_validate(content)


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
    assert table.header == ["method", "x", "y", "pooled"]
    assert table.rows == [
        ["a", ".500 ± .000", ".800 ± .141", ".500 ± .000"],
        ["joint", ".800 ± .000", ".900 ± .000", ".500 ± .000"],
    ]


def test_unseen_classes_by_hand(results, content, tmp_path):
    assert unseen_table(results) is None
    for record in content["runs"]:
        for kind, final in (("seen", 0.5), ("unseen", 0.25)):
            forgetting = None if record["method"] == "joint" else 0.125
            measures = record["measures"]["recall_at_1"] | {"final_average": final, "forgetting": forgetting}
            for part, value in (("scores", record["scores"]["recall_at_1"]), ("pooled", final), ("measures", measures)):
                record[part] |= {f"recall_at_1_{kind}": value}
    table = unseen_table(Results.model_validate(content))
    assert table.rows == [
        ["a", ".500 ± .000", ".250 ± .000", ".125 ± .000", ".125 ± .000"],
        ["joint", ".500 ± .000", ".250 ± .000", "-", "-"],
    ]
    write_report(write(tmp_path / "run", content))
    assert (
        "recall@1 of classes that are trained on, and of unseen ones" in (tmp_path / "run" / "report.html").read_text()
    )


def test_tracked_subsets_by_hand(results, content):
    assert tracked_tables(results) == []
    for record, values in zip(content["runs"], ([0.9, 0.4], [0.8], [0.7, 0.6], [0.8]), strict=True):
        record["details"] = [{"tracked": {"cats": value}} for value in values]
    (table,) = tracked_tables(Results.model_validate(content))
    assert table.title == "two <splits>: mAP of 'cats' after every split"
    assert table.header == ["method", "after x", "after y"]
    assert table.rows == [["a", ".800 ± .141", ".500 ± .141"], ["joint", "-", ".800 ± .000"]]


def test_the_index_table_by_hand(results, content):
    assert index_table(results) is None
    for record, stale, drift in ((content["runs"][0], [0.3, 0.7], 0.2), (content["runs"][2], [0.1, 0.9], 0.4)):
        scores = {"recall_at_1": stale[0]}
        update = {
            "after": "y", "old_on_old": scores, "new_on_new": scores, "new_on_old": scores, "compensated": {"ridge": scores},
            "drift": {"mean": drift, "quantiles": {}}, "k": 1, "churn": 0.5, "churn_re_embedded": 0.5, "verdict": "keep",
            "compensation": "ridge", "reason": "",
        }  # fmt: skip
        record["details"] = [{}, {"stale_gallery": {"recall_at_1": stale}, "index_update": update}]
    with_updates = Results.model_validate(content)
    table = index_table(with_updates)
    assert table.header[1:7] == [
        "fresh gallery",
        "stale gallery",
        "old on old",
        "new on new",
        "new on old",
        "with ridge",
    ]
    assert table.rows == [
        ["a", ".650 ± .071", ".500 ± .000", ".200", ".200", ".200", ".200", ".300", ".500", "keep 2"],
    ]
    (panel,) = (axis for axis in stale_gallery_figure(with_updates).axes if axis.get_title())
    assert panel.get_title() == "a"  # joint training has no update
    np.testing.assert_allclose(panel.lines[0].get_ydata(), [0.8, 0.65])
    np.testing.assert_allclose(panel.lines[1].get_ydata(), [0.8, 0.5])


def test_scores_that_were_not_measured_are_left_out(content):
    content["runs"] = [run("a", 0, [[0.9, 0.1], [0.5, 0.7]])]
    content["runs"][0]["scores"]["recall_at_1"] = [[None, None], [0.5, 0.7]]
    results = Results.model_validate(content)
    figure = scores_figure(results)
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [text.get_text() for text in axes[0].texts] == [".50", ".70"]
    np.testing.assert_allclose(axes[1].lines[0].get_xdata(), [1])
    assert split_table(results).rows == [["a", ".500", ".700", ".500"]]


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("mean_average_precision", "mAP"),
        ("mean_average_precision_at_r", "mAP@R"),
        ("mean_average_precision_found_at_100", "mAP found@100"),
        ("mean_average_precision_order_2", "mAP order 2"),
        ("r_precision", "R-precision"),
        ("mean_reciprocal_rank", "MRR"),
        ("precision_at_1", "precision@1"),
        ("image_to_fact_k10", "image to fact K10"),
        ("image_to_fact_mrr", "image to fact MRR"),
        ("accuracy", "accuracy"),
    ],
)
def test_metrics_as_people_write_them(metric, name):
    assert metric_name(metric) == name


def test_one_seed_has_no_deviation(results):
    results.runs = results.runs[:2]
    assert summary_table(results).rows[0][1] == ".600"
    assert summary_table(results).title.endswith("splits, one seed")


def test_the_figure_shows_every_method_and_split(results):
    figure = scores_figure(results)
    axes = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ["a", "joint", "split x", "split y"]
    assert [text.get_text() for text in axes[0].texts] == [".80", ".20", ".50", ".80", "▼.30"]
    not_learned = [patch for patch in axes[0].patches if patch.get_xy() == (0.53, -0.47)]
    assert [patch.get_facecolor()[3] for patch in not_learned] == [0]
    np.testing.assert_allclose(axes[3].lines[0].get_ydata(), [0.2, 0.8])


def write(folder, content, config=""):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text(config)
    return folder


def test_the_page_stands_alone(content, tmp_path):
    write_report(write(tmp_path / "run", content, "name: <b>"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "two &lt;splits&gt;" in page
    assert "name: &lt;b&gt;" in page
    assert ".650<small>±\N{NARROW NO-BREAK SPACE}.071</small>" in page  # no line can end within it
    assert (tmp_path / "run" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(["']?(https?:|//)|@import""", page)


def test_no_finished_run(content, tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        write_report(write(tmp_path / "run", content | {"runs": []}))


def test_several_runs_come_into_one_report(content, tmp_path):
    other = [run("a", 0, [[0.9, 0.1], [0.5, 0.7]]), run("b", 0, [[0.9, 0.1], [0.2, 0.4]])]
    folders = [write(tmp_path / "one", content), write(tmp_path / "two", content | {"name": "other", "runs": other})]
    with pytest.raises(UserError, match="a report of several runs needs another directory: give --out"):
        write_report(*folders)
    write_report(*folders, out=tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    assert not (tmp_path / "one" / "report.html").exists()
    assert "a (two)" in page and "two &lt;splits&gt; and other" in page


def test_the_best_of_several_runs_is_compared_with_finetune_of_its_own_run(content, tmp_path):
    methods = ("{name: finetune, label: a}", "{name: finetune, label: a}, {name: mas, label: b}")
    configs = [f"methods: [{one}]\ntraining: {{epochs: {epochs}}}" for epochs, one in enumerate(methods, start=2)]
    better = [run("a", 0, [[0.9, 0.1], [0.5, 0.7]]), run("b", 0, [[0.9, 0.1], [0.8, 0.9]])]
    folders = [
        write(tmp_path / "one", content, configs[0]),
        write(tmp_path / "two", content | {"runs": better}, configs[1]),
    ]
    write_report(*folders, out=tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    assert "<strong>b</strong> keeps <strong>75 %</strong> of what a (two) forgets" in page
    assert "<dt>epochs a split</dt><dd>2, 3</dd>" in page


def test_runs_of_other_data_do_not_compare(content, tmp_path):
    folders = [write(tmp_path / name, content, f"data: {{name: folders, root: {name}}}") for name in ("one", "two")]
    with pytest.raises(UserError, match="two is of other data than .*one"):
        write_report(*folders, out=tmp_path / "both")


UNUSUAL_NAMES = [
    ("$\\frac$", "$x$", r"a\$b$", "$"),
    ("caf\udce9", "a\nb\x1b[31m\0", "\u202eabc", "{%"),
    ("_hidden", "__", " ", "x" * 5000),
    ("\u65e5\u672c", "\U0001f600", "\u0645\u0631\u062d\u0628\u0627", "a^_b\\"),
]


@pytest.mark.parametrize("names", UNUSUAL_NAMES, ids=["formulas", "control", "underscores", "glyphs"])
def test_any_name_can_be_drawn(content, names, recwarn):
    *content["splits"], method, name = names
    for record in content["runs"]:
        record["method"] = method if record["method"] == "a" else name
        for part in ("scores", "initial", "pooled", "measures"):
            record[part] = {name: record[part]["recall_at_1"]}
    content["primary_metric"] = name
    update = {
        "after": "y", "old_on_old": {name: 0.5}, "new_on_new": {name: 0.5}, "new_on_old": {name: 0.5}, "compensated": {},
        "drift": {"mean": 0.5, "quantiles": {}}, "k": 1, "churn": 0.5, "churn_re_embedded": 0.5, "verdict": "keep",
        "compensation": None, "reason": "",
    }  # fmt: skip
    for record in content["runs"][::2]:
        record["details"] = [{}, {"stale_gallery": {name: [0.5, 0.5]}, "index_update": update}]
    results = Results.model_validate(content)
    for figure in (scores_figure(results), stale_gallery_figure(results)):
        assert png_of(figure).startswith(b"\x89PNG")
    legend = scores_figure(results).subfigs[1].legends[0]
    assert len(legend.get_texts()) == 2
    assert not recwarn.list


def test_dollars_are_drawn_as_they_are():
    text = Text(text=drawn("costs $5 or $6"))
    assert Text._preprocess_math(text, text.get_text()) == ("costs $5 or $6", False)


def test_a_figure_of_many_splits_is_not_too_large_to_draw():
    assert png_of(Figure(figsize=(2.4 * 300, 1))).startswith(b"\x89PNG")


def test_cells_cannot_break_a_table():
    table = Table("title", ["method", "a|b"], [["two\nlines", "1"]])
    assert table.to_markdown().splitlines()[0] == r"| method     | a\|b |"
    assert len(table.to_markdown().splitlines()) == 3


def test_a_narrow_terminal_shows_means_alone(results):
    table = split_table(results)
    shown = {}
    for width in (42, 41):
        console = Console(width=width, file=StringIO())
        console.print(terminal_table(table, width))
        shown[width] = console.file.getvalue().split("\n")
    assert " a       .500±.000  .800±.141  .500±.000  " in shown[42]
    assert " a       .500  .800    .500  " in shown[41]
    assert terminal_table(summary_table(results), 40).title.endswith("mean of 2 seeds")


def test_long_names_above_a_matrix_stand_at_an_angle(content):
    content["splits"] = ["credit cards", "auto and commute"]
    axis = scores_figure(Results.model_validate(content)).subfigs[0].axes[0]
    above = [tick.label2 for tick in axis.xaxis.get_major_ticks()]
    assert [(label.get_text(), label.get_rotation(), label.get_visible()) for label in above] == [
        ("credit cards", 45, True), ("auto  ... mute", 45, True),
    ]  # fmt: skip
