"""What each section of the page shows, ready for the template; a section without data is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mas_embed.evaluation import Results
from mas_embed.report.answer import answer_of
from mas_embed.report.comparison_figures import kept_figure, trade_off_figure
from mas_embed.report.drawing import (
    Margins,
    Style,
    drawn,
    names_are_narrow,
    panel,
    picture,
    room_below,
    room_for,
    styles_of,
)
from mas_embed.report.figures import (
    LONGEST_TICK,
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
from mas_embed.report.gallery import gallery_of
from mas_embed.report.page_tables import PageTable, page_table
from mas_embed.report.panels import NARROW, Key, Panel
from mas_embed.report.progress import progress_table, unfinished_sentence
from mas_embed.report.recording_sections import (
    Recorded,
    confused_section,
    layers_section,
    map_section,
    recorded_of,
)
from mas_embed.report.run_files import RunFiles
from mas_embed.report.run_sections import cost_section, course_section, files_section, index_section, memory_table
from mas_embed.report.tables import metric_name, pooled_table, split_table, summary_table, tracked_tables, unseen_table


def sections_of(
    results: Results, run_files: Sequence[RunFiles], map_method: str
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """By their name in the template all sections of the page, and by the name of the file its pictures."""
    figures: dict[str, Figure] = {}
    done = {(run.method, str(run.seed)) for run in results.runs}
    styles = styles_of_all(results, run_files)
    recorded = recorded_of(run_files, styles)
    course = course_section(run_files, styles)
    sections = {
        "unfinished": unfinished_sentence(len(done), run_files),
        "progress": progress_table(run_files, done, results.primary_metric),
        "ran": what_was_run(results, run_files),
        "keys": keys_of(styles, references_of(results)),
        "gallery": gallery_of(recorded.recordings, recorded.items, styles),
        "layers": layers_section(recorded, course["shares"], figures),
        "map": map_section(recorded, map_method, figures),
        "course": course,
        "memory": memory_table(recorded.by_method),
        "files": [files_section(files) for files in run_files],
        "mistakes": [mistake for files in run_files for mistake in files.mistakes],
    }
    if results.runs:
        sections |= finished_sections(results, run_files, recorded, figures)
    return sections, figures


def finished_sections(
    results: Results, run_files: Sequence[RunFiles], recorded: Recorded, figures: dict[str, Figure]
) -> dict[str, Any]:
    """The sections about trainings that have ended."""
    kinds_by_run = [dict(files.methods) for files in run_files]
    kinds = {title: name for one in kinds_by_run for title, name in one.items()}
    metric, references, summary = metric_name(results.primary_metric), references_of(results), summary_table(results)
    figures["scores"], figures["kept"] = scores_figure(results), kept_figure(results)
    wide, narrow = (picture(kept_figure(results, width=width), kept_label(results)) for width in (720, NARROW))
    in_the_end = f"{metric} of every split in the end, and of all together"
    return {
        "answer": answer_of(results, kinds_by_run),
        "kept": Panel(wide, "", narrow),
        "several_seeds": len({run.seed for run in results.runs}) > 1,
        "not_measured": not_measured(results),
        "summary": page_table(summary, unranked=references, title=summary.title.removeprefix(f"{results.name}: ")),
        "scores": scores_section(results, kinds, figures),
        "by_split": page_table(
            split_table(results), others=("in the end", "high"), unranked=references, title=in_the_end
        ),
        "unseen": unseen_section(results),
        "tracked": [page_table(table, others=("", "high")) for table in tracked_tables(results)],
        "pooled": page_table(pooled_table(results), others=("", "high"), unranked=references),
        "confused": confused_section(results, recorded, figures),
        "index": index_section(results, figures),
        "cost": cost_section(results),
    }


def unseen_section(results: Results) -> PageTable | None:
    """The table of classes that are trained on and of others, with what its columns mean."""
    table = unseen_table(results)
    if table is None:
        return None
    title = table.title.removeprefix(f"{results.name}: ")
    return page_table(
        table,
        notes={
            "seen": ("final average, queries of classes that are trained on", "high"),
            "unseen": ("final average, queries of classes that are never trained on", "high"),
            "forgetting, seen": ("fall from the best", "low"),
            "forgetting, unseen": ("fall from the best", "low"),
        },
        unranked=references_of(results),
        title=title,
    )


def styles_of_all(results: Results, run_files: Sequence[RunFiles]) -> dict[str, Style]:
    """The style of every method: of those with results, and of those that have only begun."""
    begun = dict.fromkeys(log.method for files in run_files for log in files.logs)
    return styles_of_results(results) | styles_of(
        [*results.methods, *(method for method in begun if method not in results.methods)], references_of(results)
    )


def what_was_run(results: Results, run_files: Sequence[RunFiles]) -> list[tuple[str, str]]:
    """Names and values of what was run: data, splits, model, methods, seeds."""
    settings = [files.settings for files in run_files]
    seeds = sorted({run.seed for run in results.runs})
    trainings = [one.get("training") for one in settings]
    epochs = [str(one.get("epochs", "")) for one in trainings if isinstance(one, dict)]
    return [
        (name, value)
        for name, value in (
            ("data", _each(_named(one.get("data")) for one in settings)),
            (f"{len(results.splits)} splits, in order", _shortlist(results.splits)),
            ("model", _each(_named(one.get("model")) for one in settings)),
            (f"{len(results.methods)} methods", _shortlist(results.methods)),
            ("seeds", ", ".join(map(str, seeds))),
            ("epochs a split", _each(epochs)),
            ("measured by", metric_name(results.primary_metric)),
        )
        if value
    ]


def not_measured(results: Results) -> str:
    """A sentence about scores that were not measured; empty if all were."""
    num_splits = len(results.splits)
    counts = {run.num_averaged.get("learning", num_splits) for run in results.runs if len(run.details) == num_splits}
    counts -= {num_splits}
    if not counts:
        return ""
    return f"Not every split was evaluated after every split: learning is a mean over {min(counts)} of {num_splits} splits."


def kept_label(results: Results) -> str:
    table = summary_table(results)
    rows = ", ".join(f"{row[0]} {row[1]}" for row in table.rows)
    return f"Mean score when learned and in the end, by method. In the end: {rows}."


def keys_of(styles: Mapping[str, Style], references: Sequence[str]) -> list[Key]:
    """The legend of all pictures with a line or point for each method."""
    keys = []
    for method, style in styles.items():
        figure, axis = panel(34, 14, Margins(2, 2, 2, 2))
        axis.plot([0, 1, 2], [0, 0, 0], color=style.color, linestyle=style.line, linewidth=1.8)
        if method not in references:
            axis.plot(1, 0, style.marker, color=style.color, markersize=6)
        axis.set_axis_off()
        keys.append(Key(method, style.group, picture(figure, "")))
    return keys


def scores_section(results: Results, kinds: Mapping[str, str], figures: dict[str, Figure]) -> dict[str, Any]:
    """The matrices, the curves and the trade-off."""
    limits, num_splits = limits_of(results), len(results.splits)
    metric = metric_name(results.primary_metric)
    matrices = [matrix_panel(results, method, limits) for method in results.methods]
    curves = []
    if num_splits > 1:
        is_small = len(results.methods) <= MOST_SHADED
        width, height = min(NARROW, max(204 if is_small else NARROW, 26 * num_splits)), 165 if is_small else 225
        below = room_below([drawn(name, LONGEST_TICK) for name in results.splits], width)
        for index, split in enumerate(results.splits):
            figure, axis = panel(width, height + below, Margins(bottom=below))
            draw_split(axis, results, index, limits, width=width)
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
        figures["trade_off"] = trade_off_figure(results, groups)
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
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    longest, cell = max(map(len, names)), cell_size(num_splits)
    is_narrow = names_are_narrow(names, cell * num_splits)
    row_names = [*names, "change"] if rows > 1 else ["all at once"]
    margins = Margins(
        room_for(row_names, size=8.5), 2, 4 * longest if is_narrow else 4, 4.6 * longest + 12 if is_narrow else 20
    )
    height = cell * (rows + (1.15 if rows > 1 else 0)) + margins.top + margins.bottom
    figure, axis = panel(cell * num_splits + margins.left + margins.right, height, margins)
    draw_matrix(axis, results, method, limits)
    values = next(row for row in _by_split(results) if row[0] == method)
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


def _each(values: Iterable[str]) -> str:
    """The values of several runs; once where they are equal."""
    return ", ".join(dict.fromkeys(value for value in values if value))


def _shortlist(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
