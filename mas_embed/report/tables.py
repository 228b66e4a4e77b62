"""Tables of a run: mean and standard deviation over the seeds, a row for each method."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mas_embed.evaluation import MEASURES, Results, RunRecord
from mas_embed.runtime.text import printable

METRIC_NAMES = {"r_precision": "R-precision", "mean_reciprocal_rank": "MRR"}


@dataclass(frozen=True)
class Table:
    """A header, and rows of text cells."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        """The table in Markdown, columns aligned."""
        header, *rows = ([printable(cell).replace("|", r"\|") for cell in line] for line in (self.header, *self.rows))
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )


def metric_name(metric: str) -> str:
    """A metric as people write it.

    >>> metric_name("mean_average_precision_at_r"), metric_name("recall_at_4")
    ('mAP@R', 'recall@4')
    """
    if metric in METRIC_NAMES:
        return METRIC_NAMES[metric]
    name = metric.replace("mean_average_precision", "mAP").replace("_at_", "@").replace("_", " ")
    return re.sub(r"@r\b|\bk(?=\d+\b)|\bmrr\b", lambda found: found[0].upper(), name)


def summary_table(results: Results) -> Table:
    """Final average, forgetting, backward transfer and learning of the primary metric, and seconds, by method.

    Values are mean ± sample standard deviation over the seeds, "-" where a measure is not defined for the method.
    """
    metric, rows = results.primary_metric, []
    for method in results.methods:
        runs = results.runs_of(method)
        cells = [mean_and_deviation(run.measures[metric][measure] for run in runs) for measure in MEASURES]
        seconds = [run.seconds["training"] + run.seconds["importance"] for run in runs]
        name = method if runs[0].keeps == "nothing" else f"{method} (keeps {runs[0].keeps})"
        rows.append([name, *cells, mean_and_deviation(seconds, digits=1)])
    num_seeds = len({run.seed for run in results.runs})
    seeds = "one seed" if num_seeds == 1 else f"mean ± deviation of {num_seeds} seeds"
    title = f"{results.name}: {metric_name(metric)} over {len(results.splits)} splits, {seeds}"
    missing = dict.fromkeys(name for run in results.runs for name in run.missing)
    if missing:
        title += f"; without {', '.join(missing)} in the end, whose data was missing"
    return Table(title, ["method", *(measure.replace("_", " ") for measure in MEASURES), "seconds"], rows)


def split_table(results: Results) -> Table:
    """The primary metric of every split after the last one, and over the items of all splits together, by method."""
    metric, rows = results.primary_metric, []
    for method in results.methods:
        final = results.matrices(method)[:, -1]
        pooled = [run.pooled[metric] for run in results.runs_of(method)]
        rows.append([method, *(mean_and_deviation(column) for column in (*final.T.tolist(), pooled))])
    title = f"{results.name}: {metric_name(metric)} of every split in the end, and of all together"
    return Table(title, ["method", *results.splits, "pooled"], rows)


def pooled_table(results: Results) -> Table:
    """Every metric over the items of all splits together after the last split, by method, mean over the seeds."""
    metrics = [name for name in results.runs[0].pooled if all(name in run.pooled for run in results.runs)]
    rows = [
        [method, *(_mean(run.pooled[metric] for run in results.runs_of(method)) for metric in metrics)]
        for method in results.methods
    ]
    return Table("Every metric in the end, over all splits together", ["method", *map(metric_name, metrics)], rows)


def unseen_table(results: Results) -> Table | None:
    """The primary metric of classes that are trained on, and of others, by method; None for data without the others."""
    metrics = [f"{results.primary_metric}_{kind}" for kind in ("seen", "unseen")]
    if not all(metric in run.measures for metric in metrics for run in results.runs):
        return None
    rows = [
        [
            method,
            *(
                mean_and_deviation(run.measures[metric][measure] for run in results.runs_of(method))
                for measure in ("final_average", "forgetting")
                for metric in metrics
            ),
        ]
        for method in results.methods
    ]
    title = f"{results.name}: {metric_name(results.primary_metric)} of classes that are trained on, and of unseen ones"
    return Table(title, ["method", "seen", "unseen", "forgetting, seen", "forgetting, unseen"], rows)


def tracked_tables(results: Results) -> list[Table]:
    """The score of every tracked subset after every split, by method: a table for each subset.

    Training on everything at once (joint) has a value in the end only; a run that did not track the subset has no row.
    """
    tables = []
    names = dict.fromkeys(name for run in results.runs for found in run.details for name in found.tracked)
    for name in names:
        rows = []
        for method in results.methods:
            runs = [run for run in results.runs_of(method) if any(name in found.tracked for found in run.details)]
            values = [[found.tracked.get(name) for found in run.details] for run in runs]
            cells = [mean_and_deviation(column) for column in zip(*values, strict=True)]
            if runs:
                rows.append([method, *["-"] * (len(results.splits) - len(cells)), *cells])
        header = ["method", *(f"after {split}" for split in results.splits)]
        tables.append(Table(f"{results.name}: mAP of '{name}' after every split", header, rows))
    return tables


def index_table(results: Results) -> Table | None:
    """What updates of the model did to the index that was made before them, by method; None if no run followed one.

    The final average with the gallery embedded again after every split (fresh), and never (stale). Then, over all splits
    but the first and all seeds, the index metric of the queries of the splits before: old queries on the old gallery, new on
    new, new on old, and new on the old gallery moved by each compensation; mean drift and churn of the old gallery; and how
    often each verdict fell.
    """
    metric, rows = results.index_metric, []
    updates_of = {
        method: [update for run in results.runs_of(method) for update in run.index_updates]
        for method in results.methods
    }
    compensations = sorted({name for updates in updates_of.values() for one in updates for name in one.compensated})
    for method, updates in updates_of.items():
        if not updates:
            continue
        runs = results.runs_of(method)
        stale = [matrix.final_average for run in runs if (matrix := run.stale_gallery_matrix(metric)) is not None]
        scores = [[one.old_on_old[metric], one.new_on_new[metric], one.new_on_old[metric]] for one in updates]
        compensated = [[one.compensated[name][metric] for one in updates] for name in compensations]
        verdicts = Counter(one.verdict for one in updates)
        rows.append(
            [
                method,
                mean_and_deviation(run.measures[metric]["final_average"] for run in runs),
                mean_and_deviation(stale),
                *map(_mean, zip(*scores, strict=True)),
                *map(_mean, compensated),
                _mean(one.drift.mean for one in updates),
                _mean(one.churn for one in updates),
                ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common()),
            ]
        )
    header = ["method", "fresh gallery", "stale gallery", "old on old", "new on new", "new on old"]
    header += [*(f"with {name}" for name in compensations), "drift", "churn", "verdicts"]
    return Table(f"What updates did to the index, {metric_name(metric)}", header, rows) if rows else None


def cost_table(results: Results) -> Table:
    """What a method costs: memory for the splits so far (in the end), and training time per optimizer step."""
    rows = []
    for method in results.methods:
        runs = results.runs_of(method)
        steps = [1000 * run.seconds["training"] / run.num_steps for run in runs if run.num_steps]
        ends = [run.seconds["importance"] / len(results.splits) for run in runs]
        memory = f"{max(run.num_bytes for run in runs) / 1024:,.0f}"
        rows.append([method, runs[0].keeps, memory, mean_and_deviation(steps, 1), mean_and_deviation(ends, 2)])
    header = ["method", "keeps of the data", "KiB in all", "ms per step", "seconds at a split's end"]
    return Table("What it costs", header, rows)


def selection_table(results: Results) -> Table | None:
    """Every candidate of every method whose options were chosen, its mean on the validation part and seconds; None if none."""
    rows = []
    for method, selection in results.selections.items():
        for one in selection.candidates:
            options = ", ".join(f"{name}={value}" for name, value in one.options.items())
            mean = str(one.error) if one.mean is None else number(one.mean, 3)
            rows.append([method, options, mean, f"{one.seconds:.0f}", "chosen" * (one.options == selection.chosen)])
    header = ["method", "options", "on validation", "seconds", ""]
    return Table("Options chosen on the validation part, with seeds that no run uses", header, rows) if rows else None


def so_far(run: RunRecord, metric: str, *, stale: bool) -> list[float]:
    """After every split the mean score of the splits learned so far, with the fresh or the stale gallery."""
    matrix = run.stale_gallery_matrix(metric) if stale else run.matrix(metric)
    assert matrix is not None
    return [float(np.mean(row[: index + 1])) for index, row in enumerate(matrix.scores)]


def _mean(values: Iterable[float | None]) -> str:
    measured = [value for value in values if value is not None and not np.isnan(value)]
    return number(float(np.mean(measured)), 3) if measured else "-"


def mean_and_deviation(values: Iterable[float | None], digits: int = 3) -> str:
    measured = [value for value in values if value is not None and not np.isnan(value)]
    if not measured:
        return "-"
    mean = number(float(np.mean(measured)), digits)
    return f"{mean} ± {number(float(np.std(measured, ddof=1)), digits)}" if len(measured) > 1 else mean


def number(value: float, digits: int) -> str:
    """A number without the zero before its point, as tables of scores are set: .435, -.296, 12.1."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
