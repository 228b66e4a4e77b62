"""What the page shows of how a run went: the old index in words, losses, seconds, memory, config and versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mas_embed.evaluation import Recording, Results, RunRecord
from mas_embed.report.answer import size_of
from mas_embed.report.drawing import Margins, Style, drawn, panel, picture, room_below
from mas_embed.report.figures import LONGEST_TICK, references_of
from mas_embed.report.index_figures import (
    draw_moved,
    draw_stale_gallery,
    methods_with_index,
    stale_gallery_figure,
)
from mas_embed.report.page_tables import NOTHING, Cell, Column, PageTable, page_table
from mas_embed.report.panels import NARROW, Panel
from mas_embed.report.run_files import RunFiles, TrainingLog
from mas_embed.report.tables import cost_table, index_table, metric_name, selection_table
from mas_embed.report.training_figures import draw_epochs, loss_of, seconds_figure, share_of_penalty

MOST_VERDICTS = 200  # sentences


@dataclass(frozen=True)
class VerdictLine:
    """The verdict after one update of one method and seed."""

    seed: int
    after: str
    verdict: str
    reason: str


def index_section(results: Results, figures: dict[str, Figure]) -> dict[str, Any] | None:
    """What updates did to the index that was made before them; None if no run followed one."""
    table = index_table(results)
    if table is None:
        return None
    figures["stale_gallery"] = stale_gallery_figure(results)
    metric = metric_name(results.index_metric)
    num_splits = len(results.splits)
    cells = {row[0]: row for row in table.rows}
    panels = []
    width = min(NARROW, max(260, 24 * num_splits))
    names = [drawn(name, LONGEST_TICK) for name in results.splits]
    below = room_below(names, width)
    for method in methods_with_index(results):
        figure, axis = panel(width, 175 + below, Margins(bottom=below))
        draw_stale_gallery(axis, results, method, width=width)
        row = cells.get(method, ["", "-", "-"])
        label = (
            f"{metric} of the splits learned so far with {method}: {row[1]} in the end with a fresh gallery, "
            f"{row[2]} with a stale one"
        )
        panels.append(Panel(picture(figure, label), method))
    moved, below = [], room_below(names, NARROW)
    for quantity, column in (("drift", "drift"), ("churn", "churn")):
        figure, axis = panel(NARROW, 185 + below, Margins(bottom=below))
        draw_moved(axis, results, quantity, width=NARROW)
        place = table.header.index(column)
        means = "; ".join(f"{row[0]} {row[place]}" for row in table.rows)
        moved.append(
            Panel(
                picture(figure, f"Mean {quantity} after every update; over all updates: {means}"),
                f"{quantity} after every update",
            )
        )
    sentences = [(method, _verdicts_of(results.runs_of(method))) for method in results.methods]
    return {
        "metric": metric,
        "table": page_table(table, others=("new queries on the old gallery, moved by this compensation", "high")),
        "verdict_table": _verdict_table(results),
        "panels": panels,
        "moved": moved,
        "verdicts": [(method, lines) for method, lines in sentences if lines],
    }


def _verdicts_of(runs: Sequence[RunRecord]) -> list[VerdictLine]:
    lines = [
        VerdictLine(run.seed, update.after, update.verdict, update.reason)
        for run in runs
        for update in run.index_updates
    ]
    return lines[:MOST_VERDICTS]


def _verdict_table(results: Results) -> PageTable:
    """The verdict after every update, of how many seeds."""
    afters = list(dict.fromkeys(update.after for run in results.runs for update in run.index_updates))
    rows = []
    for method in results.methods:
        updates = [update for run in results.runs_of(method) for update in run.index_updates]
        counts = [Counter(update.verdict for update in updates if update.after == after) for after in afters]
        if updates:
            words = [", ".join(_counted(name, found[name], sum(found.values())) for name in found) for found in counts]
            rows.append([Cell(method), *map(Cell, words)])
    columns = [Column("method", is_text=True), *(Column(f"after {after}", is_text=True) for after in afters)]
    return PageTable("May the old index stay?", columns, rows)


def _counted(verdict: str, count: int, num_seeds: int) -> str:
    return verdict if count == num_seeds else f"{verdict} ({count} of {num_seeds})"


def course_section(run_files: Sequence[RunFiles], styles: Mapping[str, Style]) -> dict[str, Any]:
    """The loss of every method over time, and the penalty's share of it."""
    logs = [log for files in run_files for log in files.logs if log.epochs]
    by_method: dict[str, list[TrainingLog]] = {}
    for log in logs:
        by_method.setdefault(log.method, []).append(log)
    losses, shares = [], []
    for method, found in by_method.items():
        if method not in styles:
            continue
        figure, axis = panel(300, 180, Margins(left=44))
        draw_epochs(axis, found, styles[method], loss_of)
        last = [log.epochs[-1].loss for log in found if log.epochs[-1].loss is not None]
        label = f"Loss of {method} over the epochs" + (f"; at the end {sum(last) / len(last):.3g}" if last else "")
        losses.append(Panel(picture(figure, label), method))
        values = [share for log in found for line in log.epochs if (share := share_of_penalty(line)) > 0]
        if values:
            figure, axis = panel(300, 180, Margins(left=44))
            draw_epochs(axis, found, styles[method], share_of_penalty)
            axis.set_ylim(0, 1)
            shares.append(
                Panel(picture(figure, f"The penalty's share of the loss of {method}, up to {max(values):.0%}"), method)
            )
    return {"losses": losses, "shares": shares}


def cost_section(results: Results) -> dict[str, Any]:
    """Seconds by part, and what each method costs."""
    label = "Seconds of a run by part: " + "; ".join(_seconds_in_words(results, method) for method in results.methods)
    wide, narrow = (picture(seconds_figure(results, width=width), label) for width in (620, NARROW))
    selection = selection_table(results)
    return {
        "seconds": Panel(wide, "", narrow),
        "table": page_table(cost_table(results), unranked=references_of(results)),
        "selection": None if selection is None else page_table(selection),
    }


def _seconds_in_words(results: Results, method: str) -> str:
    runs = results.runs_of(method)
    parts = (
        f"{part} {sum(run.seconds.get(part, 0) for run in runs) / len(runs):.1f}"
        for part in ("training", "importance", "evaluation")
    )
    return f"{method} {', '.join(parts)}"


def memory_table(by_method: Mapping[str, Sequence[Recording]]) -> PageTable | None:
    """The largest memory of the process and of the GPU by method; None where it was not recorded."""
    names = {"process_peak": "process", "cuda_peak": "GPU"}
    notes = {
        "process_peak": "largest so far; it never falls from one training to the next",
        "cuda_peak": "largest of this training",
    }
    peaks = {
        method: {key: max((one.memory.get(key, 0) for one in recordings), default=0) for key in names}
        for method, recordings in by_method.items()
    }
    keys = [key for key in names if any(values[key] for values in peaks.values())]
    if not keys:
        return None
    columns = [Column("method", is_text=True), *(Column(names[key], notes[key]) for key in keys)]
    rows = [
        [
            Cell(method),
            *(Cell(size_of(values[key]) if values[key] else NOTHING, value=float(values[key]) or None) for key in keys),
        ]
        for method, values in peaks.items()
    ]
    return PageTable("Largest memory", columns, rows)


def files_section(files: RunFiles) -> dict[str, Any]:
    """The config and its changes, the machine and the versions, and the command that starts the run again."""
    machine = files.machine
    packages, command = machine.get("packages"), machine.get("command")
    lines = {
        name: value for name, value in machine.items() if value is not None and name not in ("packages", "command")
    }
    lines |= packages if isinstance(packages, dict) else {}
    return {
        "config": files.config,
        "changes": files.changes,
        "environment": [(str(name), str(value)) for name, value in lines.items()],
        "command": command if isinstance(command, str) else "",
    }
