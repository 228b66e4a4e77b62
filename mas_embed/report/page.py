"""A run directory's report: one picture and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from matplotlib.figure import Figure

from mas_embed.errors import UserError
from mas_embed.files import write_file
from mas_embed.report.figures import old_index_figure, scores_figure
from mas_embed.report.tables import (
    Table,
    cost_table,
    followed_tables,
    methods_of,
    metric_name,
    old_index_table,
    selection_table,
    split_table,
    summary_table,
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f6f6f6; padding: 1rem; overflow: auto; font-size: 13px }
summary { cursor: pointer }
</style>
<h1>{{ name }}</h1>
{% macro show(table) %}
<h2>{{ table.title }}</h2>
<table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{{ show(summary) }}
<p><em>Final average</em>: the mean over all splits in the end. <em>Forgetting</em>: how far a split fell from its best (lower is
better). <em>Backward transfer</em>: the change since a split was learned. <em>Learning</em>: the score on a split right after it.
<em>Seconds</em>: training, and what the method does when a split ends.</p>
{{ show(by_split) }}
{% for table in followed %}{{ show(table) }}{% endfor %}
<p><img src="data:image/png;base64,{{ picture }}" alt="score matrices and scores over time"></p>
{% if old_index %}
{{ show(old_index) }}
<p><em>Embedded again</em> and <em>never again</em>: the final average with the whole gallery embedded anew after every split,
and with one where an item keeps the vector it had when its split was learned. The other columns are means over all splits but
the first, for the queries and gallery of the splits before: <em>old</em> queries on the old gallery, <em>new</em> on new,
<em>mixed</em>: new queries on the old gallery, then on that gallery moved by each compensation, fitted on the new split's
training inputs only. <em>Drift</em>: how far the old gallery's items moved. <em>Churn</em>: share of a query's nearest items that
it loses on the old gallery. <em>Verdicts</em>: keep the index if mixed comes within .01 mAP of new, compensate if a
compensation does, else re-embed.</p>
<p><img src="data:image/png;base64,{{ index_picture }}" alt="scores over time with and without embedding the gallery again"></p>
{% endif %}
{{ show(final) }}
{{ show(cost) }}
{% if selection %}{{ show(selection) }}{% endif %}
<details><summary>Config</summary><pre>{{ config }}</pre></details>
<details><summary>Environment</summary><pre>{{ environment }}</pre></details>
</html>
"""


def write_report(run_directory: str | Path, *others: str | Path, out: str | Path | None = None) -> None:
    """Writes `scores.png`, `report.html`, and `old_index.png` if an index was watched, from one run directory or several.

    Args:
        run_directory: whose `results.json` is read.
        others: more of them, over the same splits, whose methods come into the same tables and pictures.
        out: where to write; None: into `run_directory`, if it is the only one.

    Raises:
        UserError: there are no results to report, the runs cannot be compared, or there is no `out` for several.
    """
    folders = [Path(folder) for folder in (run_directory, *others)]
    if out is None and others:
        raise UserError("a report of several runs needs a directory of its own: give --out")
    target = folders[0] if out is None else Path(out)
    results = join_results(folders)
    if not results["runs"]:
        raise UserError(f"{folders[0]} holds no finished run to report")
    target.mkdir(parents=True, exist_ok=True)
    picture, old_index = _png(scores_figure(results)), old_index_table(results)
    index_picture = _png(old_index_figure(results)) if old_index else b""
    page = Environment(autoescape=True).from_string(PAGE)
    html = page.render(
        name=results["name"],
        summary=summary_table(results),
        by_split=split_table(results),
        followed=followed_tables(results),
        final=_final_scores(results),
        cost=cost_table(results),
        selection=selection_table(results),
        picture=base64.b64encode(picture).decode(),
        old_index=old_index,
        index_picture=base64.b64encode(index_picture).decode(),
        config="\n".join(_text(folder / "config.yaml") for folder in folders),
        environment="\n".join(_text(folder / "environment.json") for folder in folders),
    )
    write_file(target / "scores.png", picture)
    if old_index:
        write_file(target / "old_index.png", index_picture)
    write_file(target / "report.html", html)


def join_results(folders: Sequence[Path]) -> dict[str, Any]:
    """The results of several runs as those of one; a method that two of them have is named with its run.

    Raises:
        UserError: the runs are not of the same data and splits, or not of the same primary metric.
    """
    all_results = [read_results(folder) for folder in folders]
    first = all_results[0]
    for folder, results in zip(folders, all_results, strict=True):
        for key in ("splits", "primary_metric"):
            if results[key] != first[key]:
                raise UserError(
                    f"{folder} has {key} {results[key]}, but {folders[0]} has {first[key]}; they do not compare"
                )
        if _data_of(folder) != _data_of(folders[0]):
            raise UserError(f"{folder} is of other data than {folders[0]}, as their configs say; they do not compare")
    counts = Counter(method for results in all_results for method in methods_of(results))
    joined = first | {"name": " and ".join(dict.fromkeys(results["name"] for results in all_results)), "runs": []}
    joined["selections"] = {}
    for folder, results in zip(folders, all_results, strict=True):
        titles = {name: name if counts[name] == 1 else f"{name} ({folder.name})" for name in methods_of(results)}
        joined["runs"] += [run | {"method": titles[run["method"]]} for run in results["runs"]]
        joined["selections"] |= {
            titles[name]: own for name, own in results.get("selections", {}).items() if name in titles
        }
    return joined


def _data_of(folder: Path) -> Any:
    """What the config of a run says of its data."""
    config = yaml.safe_load(_text(folder / "config.yaml"))
    return config.get("data") if isinstance(config, dict) else None


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def read_results(run_directory: str | Path) -> dict[str, Any]:
    """What a run directory's `results.json` holds."""
    path = Path(run_directory) / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name the directory of a run") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != 1 or not isinstance(results.get("runs"), list):
        raise UserError(f"{path} does not hold the results of a run")
    return results


def _final_scores(results: Mapping[str, Any]) -> Table:
    """Every metric over all splits together after the last one, by method, mean over the seeds."""
    metrics = [name for name in results["runs"][0]["all"] if all(name in run["all"] for run in results["runs"])]
    rows = []
    for method in methods_of(results):
        finals = [run["all"] for run in results["runs"] if run["method"] == method]
        rows.append([method, *(f"{sum(final[metric] for final in finals) / len(finals):.3f}" for metric in metrics)])
    return Table("Every metric in the end, over all splits together", ["method", *map(metric_name, metrics)], rows)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
