"""The page as a browser shows it, and as a person reads it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mas_embed import UserError
from mas_embed.evaluation import (
    EmbeddingMap,
    Item,
    ItemKey,
    Items,
    RecordedClasses,
    RecordedNeighbours,
    RecordedParameters,
    RecordedQueries,
    Recording,
    Results,
)
from mas_embed.report import render, write_report
from mas_embed.report.drawing import Margins, panel, styles_of
from mas_embed.report.gallery import Tile, gallery_of
from mas_embed.report.labels import label_points
from mas_embed.report.map_figures import map_figure
from mas_embed.report.run_files import LogLine, RunFiles, TrainingLog

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
CONFIG = """
name: two
seeds: [0, 1]
data: {name: digits}
model: {name: small_conv}
methods: [{name: finetune}, {name: mas, strength: 3}, {name: joint}]
training: {epochs: 2}
evaluation: {name: retrieval, primary_metric: recall_at_1}
"""


def run(method, seed, matrix, own=None, **other):
    is_sequence = len(matrix) > 1
    measures = {
        "final_average": float(np.mean(matrix[-1])),
        "forgetting": matrix[0][0] - matrix[-1][0] if is_sequence else None,
        "backward_transfer": matrix[-1][0] - matrix[0][0] if is_sequence else None,
        "learning": float(np.mean(np.diag(matrix))) if is_sequence else None,
    }
    details = [{"own_gallery": {"recall_at_1": row}} if own else {} for row in own or matrix]
    return {
        "method": method, "seed": seed, "scores": {"recall_at_1": matrix}, "pooled": {"recall_at_1": 0.5},
        "measures": {"recall_at_1": measures}, "details": details, "num_steps": 10,
        "seconds": {"training": 2.0, "importance": 1.0, "evaluation": 0.5}, **other,
    }  # fmt: skip


def update(verdict):
    scores = {"recall_at_1": 0.6}
    return {
        "after": "y", "old_on_old": scores, "new_on_new": scores, "new_on_old": scores, "compensated": {"ridge": scores},
        "drift": {"mean": 0.2, "quantiles": {}}, "k": 1, "churn": 0.5, "churn_re_embedded": 0.5, "verdict": verdict,
        "compensation": "ridge", "reason": f"because of {verdict}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def results():
    runs = [
        run("finetune", 0, [[0.9, 0.1], [0.5, 0.7]], own=[[0.9, None], [0.85, 0.8]]),
        run("mas", 0, [[0.9, 0.1], [0.8, 0.7]], num_bytes=2048, own=[[0.9, None], [0.84, 0.8]]),
        run("joint", 0, [[0.8, 0.9]]),
    ]
    for record in runs[:2]:
        record["details"][1] |= {"stale_gallery": {"recall_at_1": [0.4, 0.7]}, "index_update": update("keep")}
    content = {"schema": 2, "name": "two", "splits": ["x", "y"], "primary_metric": "recall_at_1", "runs": runs}
    return Results.model_validate(content)


def neighbours(labels):
    labels = np.array(labels)
    return RecordedNeighbours(np.zeros_like(labels), np.arange(labels.size).reshape(labels.shape), labels, labels * 0.5)


def recording(method, now=((1, 0), (0, 1))):
    """Two queries of class 0, of which the first falls from 1 to .25, and the second rises from .5 to 1."""
    queries = RecordedQueries(
        "item", "item", "average precision", "cosine", split=np.zeros(2, int), index=np.arange(2), label=np.zeros(2, int),
        rows=np.arange(2), scores=np.array([[1, 0.5], [0.25, 1]]), score_learned=np.array([1, 0.5]),
        score_now=np.array([0.25, 1]), learned=neighbours([[0, 0], [1, 0]]), now=neighbours(now),
    )  # fmt: skip
    classes = RecordedClasses(
        "average precision", np.array([0]), np.array([0]), np.array([2]), np.array([0.75]), np.array([0.6])
    )
    points = np.array([[0, 0], [0, 1], [1, 0], [2, 2.0]])
    embedded = EmbeddingMap(
        np.zeros(4, int), np.arange(4), np.array([0, 0, 1, 1]), points, points[::-1], np.arange(2), np.zeros(2, int),
        points[:2], points[1:3], np.array([0.7, 0.2]),
    )  # fmt: skip
    parameters = RecordedParameters(
        ["trunk.0.weight", "trunk.0.bias", "head.weight"], np.array([4, 2, 10]), np.arange(2),
        np.ones((2, 3)), np.full((2, 3), 0.1), np.ones((2, 3)), np.ones((2, 3)), np.array([1.0, 1.0, 6.0]),
        np.tile([0.1, 0.2, 0.3, 0.4, 0.5], (3, 1)),
    )  # fmt: skip
    return Recording(
        method, 0, f"{method}/seed0", ["x", "y"], 1, queries, classes, embedded, parameters, {"process_peak": 5 * 2**20}
    )


@pytest.fixture(scope="module")
def run_files():
    pictures = {ItemKey(part, 0, index): Item(0, PNG) for part in ("query", "gallery") for index in range(4)}
    lines = [
        LogLine(event="epoch", split=split, split_index=index, num_splits=2, epoch=epoch, loss=1.0, penalty=0.25)
        for index, split in enumerate("xy")
        for epoch in range(2)
    ]
    logs = [TrainingLog(method, "0", lines, []) for method in ("finetune", "mas")]
    recordings = [recording("finetune"), recording("mas")]
    items = Items(pictures, {0: "cat", 1: "<dog>"})
    machine = json.dumps({"python": "3.11", "command": "mas-embed run two.yaml", "packages": {"torch": "2.6"}})
    return RunFiles(CONFIG, machine, logs, recordings, items, "name: two\n")


@pytest.fixture(scope="module")
def files(results, run_files):
    return render(results, [run_files])


@pytest.fixture(scope="module")
def page(files):
    return files["report.html"].decode()


def words(html):
    """What is written on the page, without pictures."""
    html = re.sub(r"<(style|script|svg)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_answer_comes_first(page):
    # finetune falls by .4 and mas by .1: a quarter; final averages .6 and .75
    text = words(page)
    assert "mas keeps 75 % of what finetune forgets: a split loses .10 instead of .40" in text
    assert "in the end is .75 instead of .60" in text
    assert "as many seconds as finetune and 2.0 KiB of memory" in text
    assert "(joint), the model reaches .85; mas covers 60 % of the distance from finetune" in text
    assert "after 1 update of mas, the stored vectors could stay as they are 1 time." in text
    assert "3 of 6 trainings have ended" in text


def test_it_says_of_every_method_whether_splits_are_forgotten_or_confused(page):
    # finetune: own .85 -> .825, a fall of .025; all .8 -> .6, a fall of .2.  mas: own .85 -> .82; all .8 -> .75
    text = words(page)
    assert "finetune mostly confused Among its own items a split scores .82 in the end (.85 when learned)" in text
    assert "mas mostly forgotten Among its own items a split scores .82 in the end (.85 when learned)" in text


def test_best_values_are_marked_by_a_sign(page):
    row = re.search(r'<th scope="row" class="words">mas</th>(.*?)</tr>', page, re.DOTALL)[1]
    first = re.search(r'<td class="([^"]*)" data-value="0.75" title="([^"]*)">', row)
    assert first[1].split() == ["best"] and first[2] == "the best of the column"
    assert '.best::before { content: "★"' in page


def test_forgotten_queries_are_shown_with_what_is_right_and_wrong(page):
    gallery = page[page.index('id="queries"') : page.index('id="confused"')]
    assert "average precision fell by .75 on average" in words(gallery)
    assert "1 query that later splits improved" in words(gallery)
    assert gallery.count("<symbol ") == len(set(re.findall(r'<symbol id="([^"]+)"', gallery)))
    first = re.search(r"<article.*?</article>", gallery, re.DOTALL)[0]
    assert re.findall(r'role="img" aria-label="([^"]+)"', first)[:5] == [
        "cat", "cat, right", "cat, right", "&lt;dog&gt;, wrong", "cat, right",
    ]  # fmt: skip


def test_texts_and_names_stand_for_pictures(run_files):
    texts = {
        ItemKey(part, 0, index): Item(0, None, f"<{part} {index}>")
        for part in ("query", "gallery")
        for index in range(4)
    }
    styles = styles_of(["finetune", "mas"])
    gallery = gallery_of(run_files.recordings, Items(texts, {0: "cat"}), styles)
    assert gallery.fallen[0].query == Tile("cat", text="<query 0>")
    assert gallery.fallen[0].found[0].now[:1] == [Tile("1", text="<gallery 0>", is_right=False)]
    gallery = gallery_of(run_files.recordings, Items(label_names={0: "cat"}, note="Vectors have no picture."), styles)
    assert gallery.note == "Vectors have no picture." and not gallery.symbols
    assert gallery.fallen[0].query == Tile("cat")


def test_sections_without_data_are_left_out(results):
    page = render(results)["report.html"].decode()
    assert re.findall(r'<section id="(\w+)"', page) == ["summary", "scores", "confused", "index", "course"]
    for href in re.findall(r'href="#(\w+)"', page[: page.index("<main>")]):
        assert f'id="{href}"' in page


def test_what_was_run_and_how(page):
    text = words(page)
    for expected in (
        "2 splits, in order x, y",
        "3 methods finetune, mas, joint",
        "mas-embed run two.yaml",
        "torch 2.6",
        "5.0 MiB",
    ):
        assert expected in text


def test_pictures_are_files_too(files):
    names = {"scores", "kept", "trade_off", "confused", "layers", "map", "stale_gallery"}
    assert set(files) == {"report.html", *(f"{name}.png" for name in names)}
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))


def test_every_picture_has_the_colours_of_the_style_sheet(page):
    for svg in re.findall(r'<svg class="picture".*?</svg>', page, re.DOTALL):
        used = set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#ffffff"}
        assert not used
    defined = set(re.findall(r"^\s*(?:.*?[ {])?--([\w-]+):", page, re.MULTILINE)) | set(
        re.findall(r"--([\w-]+):", page)
    )
    assert set(re.findall(r"var\(--([\w-]+)\)", page)) <= defined


def test_a_run_that_is_still_going(tmp_path):
    folder = tmp_path / "run"
    (folder / "mas" / "seed0").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    log = [
        {"event": "epoch", "split": "x", "split_index": 0, "num_splits": 2, "epoch": 1, "loss": 0.5, "penalty": 0.0},
        {"event": "split", "split": "x", "split_index": 0, "num_splits": 2, "scores": {"recall_at_1": [0.75, 0.1]}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in log)
    (folder / "mas" / "seed0" / "log.jsonl").write_text(text + '{"event": "ep')
    write_report(folder)
    page = words((folder / "report.html").read_text())
    assert "0 of 6 trainings have ended" in page
    assert "mas, seed 0 1 of 2 2 of x 0.5 .750" in page
    (folder / "mas" / "seed0" / "log.jsonl").write_text("{}\n" + text)
    with pytest.raises(UserError, match=r"there is no .*results.json"):
        write_report(folder)


def test_methods_of_the_map(tmp_path):
    with pytest.raises(UserError, match="method of the map 'tnse'.*did you mean 'tsne'"):
        write_report(tmp_path, map_method="tnse")


def test_the_map_has_an_arrow_for_the_mean_of_every_class(run_files):
    embedded = run_files.recordings[0].map
    figure, moved = map_figure(embedded, run_files.items, "pca", width=400)
    before, now = figure.axes
    arrows = [text for text in now.texts if isinstance(text, Annotation)]
    # class 0 is at (0, 0) and (0, 1), then at (2, 2) and (1, 0)
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((0, 0.5), (1.5, 1)), ((1.5, 1), (0, 0.5))]
    assert moved.split(", ")[0] == "cat" and len(before.texts) == 2


def test_tsne_fits_both_times_together(run_files):
    figure, _ = map_figure(run_files.recordings[0].map, run_files.items, "tsne", width=400)
    points = [
        np.concatenate([line.get_xydata() for line in axis.lines if line.get_linestyle() == "None"])
        for axis in figure.axes
    ]
    assert [len(one) for one in points] == [4, 6] and np.isfinite(points[0]).all()  # and a ring for each arrow


def test_no_name_covers_another_or_a_point():
    points = {f"method {index}": (0.1 + 0.02 * (index % 3), 0.5 + 0.01 * (index // 3)) for index in range(6)}
    _, axis = panel(500, 300, Margins())
    axis.plot(*zip(*points.values(), strict=True), "o")
    axis.margins(1.5)
    label_points(axis, points)
    boxes = [
        Bbox.from_bounds(*(text.get_transform().transform(text.get_position()) - (30, 6)), 60, 12)
        for text in axis.texts
    ]
    dots = [axis.transData.transform(point) for point in points.values()]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


PROBE = """
<script>
const found = {errors: []};
addEventListener("error", (event) => found.errors.push(String(event.message)));
console.error = console.warn = (...values) => found.errors.push(values.join(" "));
addEventListener("load", () => {
  const isShown = (one) => one.checkVisibility ? one.checkVisibility() : true;
  const pictures = [...document.querySelectorAll("img, svg")];
  found.unnamed = pictures.filter((one) => !one.closest("[aria-hidden=true]") && isShown(one)
    && !(one.alt || one.getAttribute("aria-label"))).length;
  found.num_pictures = pictures.length;
  found.width = document.scrollingElement.scrollWidth;
  const table = document.querySelector("table"), names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  found.before = names();
  table.querySelectorAll("th button")[1].click();
  found.after = names();
  const line = document.querySelector("#scores .picture .method-1");
  document.querySelector("#scores button[data-group=method-1]").click();
  found.is_hidden = line.style.display;
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    """At a phone's width: a window of Chromium is never so narrow, so the page is in a frame."""
    (tmp_path / "page.html").write_text(page.replace("<head>", "<head>" + PROBE, 1))
    frame = '<iframe src="page.html" style="width: 400px; height: 900px; border: 0"></iframe>'
    listen = '<script>addEventListener("message", (event) => { document.body.textContent = event.data; });</script>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{listen}{frame}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--dump-dom"]
    printed = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frame.html'}"],
        capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip
    found = json.loads(re.search(r"\{.*\}", printed)[0])
    assert found["errors"] == []
    assert found["width"] <= 400
    assert found["num_pictures"] > 20 and found["unnamed"] == 0
    assert found["before"] == ["finetune", "mas", "joint"]
    assert found["after"] == ["joint", "mas", "finetune"]  # .85, .75, .6
    assert found["is_hidden"] == "none"
