"""What each section of the page shows, ready for the template; a section without data is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mas_embed.evaluation import Results
from mas_embed.report.answer import answer_of
from mas_embed.report.comparison_figures import kept_figure, trade_off_figure
from mas_embed.report.drawing import drawn, panel, picture
from mas_embed.report.figures import (
    MOST_SHADED,
    cell_size,
    draw_matrix,
    draw_split,
    limits_of,
    references_of,
    scores_figure,
    short_score,
    styles_of_results,
)
from mas_embed.report.page_tables import page_table
from mas_embed.report.panels import NARROW, Key, Panel
from mas_embed.report.run_files import RunFiles
from mas_embed.report.run_sections import command_of, cost_section, course_section, environment_lines, index_section
from mas_embed.report.tables import metric_name, pooled_table, split_table, summary_table, tracked_tables


def sections_of(results: Results, run_files: Sequence[RunFiles]) -> tuple[dict[str, Any], dict[str, Figure]]:
    """By their name in the template all sections of the page, and by the name of the file its pictures."""
    kinds = {title: name for files in run_files for title, name in files.methods}
    figures = {"scores": scores_figure(results), "kept": kept_figure(results)}
    summary = summary_table(results)
    sections = {
        "answer": answer_of(results, kinds),
        "ran": what_was_run(results, run_files),
        "kept": Panel(
            picture(kept_figure(results), kept_label(results)),
            "",
            picture(kept_figure(results, width=NARROW), kept_label(results)),
        ),
        "summary": page_table(
            summary, unranked=references_of(results), title=summary.title.removeprefix(f"{results.name}: ")
        ),
        "scores": scores_section(results, kinds),
        "keys": keys_of(results),
        "by_split": page_table(
            split_table(results),
            others=("in the end", "high"),
            unranked=references_of(results),
            title=f"{metric_name(results.primary_metric)} of every split in the end, and of all together",
        ),
        "tracked": [page_table(table, others=("", "high")) for table in tracked_tables(results)],
        "pooled": page_table(pooled_table(results), others=("", "high"), unranked=references_of(results)),
        "index": index_section(results, figures),
        "course": course_section(results, run_files, styles_of_results(results), figures),
        "cost": cost_section(results),
        "files": [
            {"config": files.config, "environment": environment_lines(files), "command": command_of(files)}
            for files in run_files
        ],
        "mistakes": [mistake for files in run_files for mistake in files.mistakes],
    }
    return sections, figures


def what_was_run(results: Results, run_files: Sequence[RunFiles]) -> list[tuple[str, str]]:
    """Names and values of what was run: data, splits, model, methods, seeds."""
    settings = run_files[0].settings if run_files else {}
    seeds = sorted({run.seed for run in results.runs})
    data, model, training = (settings.get(name) for name in ("data", "model", "training"))
    return [
        (name, value)
        for name, value in (
            ("data", _named(data)),
            (f"{len(results.splits)} splits, in order", _shortlist(results.splits)),
            ("model", _named(model)),
            (f"{len(results.methods)} methods", _shortlist(results.methods)),
            ("seeds", ", ".join(map(str, seeds))),
            ("epochs a split", str(training.get("epochs", "")) if isinstance(training, dict) else ""),
            ("measured by", metric_name(results.primary_metric)),
        )
        if value
    ]


def kept_label(results: Results) -> str:
    table = summary_table(results)
    rows = ", ".join(f"{row[0]} {row[1]}" for row in table.rows)
    return f"Mean score when learned and in the end, by method. In the end: {rows}."


def keys_of(results: Results) -> list[Key]:
    """The legend of all pictures with a line or point for each method."""
    keys = []
    for method, style in styles_of_results(results).items():
        figure, axis = panel(34, 14)
        axis.plot([0, 1, 2], [0, 0, 0], color=style.color, linestyle=style.line, linewidth=1.8)
        if method not in references_of(results):
            axis.plot(1, 0, style.marker, color=style.color, markersize=6)
        axis.set_axis_off()
        keys.append(Key(method, style.group, picture(figure, "")))
    return keys


def scores_section(results: Results, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The matrices, the curves and the trade-off."""
    limits, num_splits = limits_of(results), len(results.splits)
    metric = metric_name(results.primary_metric)
    matrices = [matrix_panel(results, method, limits) for method in results.methods]
    curves = []
    if num_splits > 1:
        height = 190 if len(results.methods) <= MOST_SHADED else 250
        for index, split in enumerate(results.splits):
            figure, axis = panel(
                min(NARROW, max(204 if len(results.methods) <= MOST_SHADED else NARROW, 26 * num_splits)), height
            )
            draw_split(axis, results, index, limits)
            axis.set_title("")
            finals = "; ".join(f"{name} {row[index + 1]}" for name, *row in _by_split(results))
            curves.append(
                Panel(picture(figure, f"{metric} of split {split} over time; in the end: {finals}"), f"split {split}")
            )
    label = "Forgetting against learning, a point for each method: " + "; ".join(
        f"{row[0]} {row[2]} and {row[4]}" for row in summary_table(results).rows
    )
    trade_off = None
    if num_splits > 1 and any(row[2] != "-" for row in summary_table(results).rows):
        groups = strength_groups(results, kinds)
        wide, narrow = (picture(trade_off_figure(results, groups, width=width), label) for width in (620, NARROW))
        trade_off = Panel(wide, "", narrow)
    return {
        "metric": metric,
        "limits": [short_score(limit) for limit in limits],
        "matrices": matrices,
        "curves": curves,
        "trade_off": trade_off,
        "has_bands": len({run.seed for run in results.runs}) > 1 and len(results.methods) <= MOST_SHADED,
    }


def matrix_panel(results: Results, method: str, limits: tuple[float, float]) -> Panel:
    num_splits = len(results.splits)
    rows = results.matrices(method).shape[1]
    longest = max(len(drawn(name, 14)) for name in results.splits)
    cell = cell_size(num_splits)
    is_narrow = longest * 6.2 > cell
    width = 6 * longest + 14 + cell * num_splits + (4 * longest if is_narrow else 0)
    height = cell * (rows + (1.15 if rows > 1 else 0)) + (5 * longest if is_narrow else 24) + 8
    figure, axis = panel(max(width, 150), height)
    draw_matrix(axis, results, method, limits)
    values = [row for row in _by_split(results) if row[0] == method][0]
    ends = ", ".join(f"{split} {value}" for split, value in zip(results.splits, values[1:], strict=False))
    return Panel(picture(figure, f"Scores of {method} on every split after every split; in the end: {ends}"), method)


def strength_groups(results: Results, kinds: Mapping[str, str]) -> list[list[str]]:
    """The methods of one kind that differ in nothing but their strength, in its order."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for method in results.methods:
        options = dict(results.runs_of(method)[0].options)
        strength = options.pop("strength", None)
        if isinstance(strength, int | float):
            groups.setdefault((kinds.get(method, method), repr(options)), []).append((float(strength), method))
    return [[name for _, name in sorted(found)] for found in groups.values() if len(found) > 1]


def _by_split(results: Results) -> list[list[str]]:
    return split_table(results).rows


def _named(component: Any) -> str:
    return str(component.get("name", "")) if isinstance(component, dict) else ""


def _shortlist(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
