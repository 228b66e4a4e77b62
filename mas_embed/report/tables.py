"""A run's results as a table: mean and standard deviation over the seeds, a row a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = {
    "final_average": "final average",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "learning": "learning",
}

METRIC_NAMES = {
    "mean_average_precision": "mAP",
    "mean_average_precision_at_r": "mAP@R",
    "r_precision": "R-precision",
    "mean_reciprocal_rank": "MRR",
    "precision_at_1": "precision@1",
    "mean_average_precision_found_at_100": "mAP found@100",
    "mean_average_precision_extending": "mAP extending",
    **{f"mean_average_precision_order_{order}": f"mAP order {order}" for order in (1, 2, 3)},
    **{f"image_to_fact_k{k}": f"K{k}" for k in (1, 5, 10)},
    "image_to_fact_mrr": "image to fact MRR",
}


@dataclass(frozen=True)
class Table:
    """A header, and rows of text cells."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        """The table in Markdown, columns aligned."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
        )


def metric_name(metric: str) -> str:
    """A metric as people write it: "mAP", "recall@4"."""
    return METRIC_NAMES.get(metric, metric.replace("recall_at_", "recall@"))


def methods_of(results: Mapping[str, Any]) -> list[str]:
    """The methods of a run, in the order in which they were trained first."""
    return list(dict.fromkeys(run["method"] for run in results["runs"]))


def score_matrices(results: Mapping[str, Any], method: str, metric: str) -> NDArray[np.float64]:
    """The score matrices [seeds, rows, S] of a method."""
    return np.array([run["scores"][metric] for run in results["runs"] if run["method"] == method])


def summary_table(results: Mapping[str, Any]) -> Table:
    """Final average, forgetting, backward transfer and learning of the primary metric, and seconds, by method.

    Values are mean ± sample standard deviation over the seeds, "-" where a measure is not defined for the method.
    """
    metric = results["primary_metric"]
    rows = []
    for method in methods_of(results):
        runs = [run for run in results["runs"] if run["method"] == method]
        cells = [_mean_and_deviation([run["measures"][metric][measure] for run in runs]) for measure in COLUMNS]
        seconds = [run["seconds"]["training"] + run["seconds"]["importance"] for run in runs]
        kept = _kept(runs)
        name = f"{method} (keeps {kept})" if kept != "nothing" else method
        rows.append([name, *cells, _mean_and_deviation(seconds, digits=1)])
    num_seeds = len({run["seed"] for run in results["runs"]})
    title = f"{results['name']}: {metric_name(metric)} over {len(results['splits'])} splits, mean ± deviation of {num_seeds} seed"
    return Table(title + "s" * (num_seeds != 1), ["method", *COLUMNS.values(), "seconds"], rows)


def selection_table(results: Mapping[str, Any]) -> Table | None:
    """Every candidate of every method whose options were chosen, its mean on the validation part and seconds; None if none."""
    rows = []
    for method, selection in results.get("selections", {}).items():
        for candidate in selection["candidates"]:
            options = ", ".join(f"{name}={value}" for name, value in candidate["options"].items())
            mean = candidate["error"] if candidate["mean"] is None else _number(candidate["mean"], 3)
            is_chosen = candidate["options"] == selection.get("chosen")
            rows.append([method, options, mean, f"{candidate['seconds']:.0f}", "chosen" if is_chosen else ""])
    header = ["method", "options", "on validation", "seconds", ""]
    return Table("Options chosen on the validation part, with seeds of their own", header, rows) if rows else None


def cost_table(results: Mapping[str, Any]) -> Table:
    """What a method costs: memory kept for the splits so far (at the end), and training time per optimizer step."""
    rows = []
    for method in methods_of(results):
        runs = [run for run in results["runs"] if run["method"] == method]
        kept = max(run.get("kept_bytes", 0) for run in runs) / 1024
        steps = [1000 * run["seconds"]["training"] / run["num_steps"] for run in runs if run.get("num_steps")]
        ends = [run["seconds"]["importance"] / len(results["splits"]) for run in runs]
        rows.append([method, _kept(runs), f"{kept:,.0f}", _mean_and_deviation(steps, 1), _mean_and_deviation(ends, 2)])
    header = ["method", "keeps of the data", "KiB kept in all", "ms per step", "seconds at a split's end"]
    return Table("What it costs", header, rows)


def split_table(results: Mapping[str, Any]) -> Table:
    """The primary metric of every split after the last one, and over all splits together, by method."""
    metric, rows = results["primary_metric"], []
    for method in methods_of(results):
        final = score_matrices(results, method, metric)[:, -1]
        over_all = [run["all"][metric] for run in results["runs"] if run["method"] == method]
        rows.append([method, *(_mean_and_deviation(column) for column in (*final.T.tolist(), over_all))])
    title = f"{results['name']}: {metric_name(metric)} of every split in the end, and of all together"
    return Table(title, ["method", *results["splits"], "all"], rows)


def followed_tables(results: Mapping[str, Any]) -> list[Table]:
    """Mean average precision of what was followed beside the splits, after every split, by method: a table each.

    Training on everything at once (joint) has a value in the end only; a run that did not follow it has no row.
    """
    tables = []
    for name in dict.fromkeys(name for run in results["runs"] for name in run.get("followed", {})):
        rows, runs = [], [run for run in results["runs"] if name in run.get("followed", {})]
        for method in methods_of({"runs": runs}):
            values = np.array([run["followed"][name] for run in runs if run["method"] == method])
            cells = [_mean_and_deviation(column) for column in values.T.tolist()]
            rows.append([method, *["-"] * (len(results["splits"]) - len(cells)), *cells])
        header = ["method", *(f"after {split}" for split in results["splits"])]
        tables.append(Table(f"{results['name']}: mAP of '{name}' after every split", header, rows))
    return tables


def old_index_table(results: Mapping[str, Any]) -> Table | None:
    """What training did to indexes that were made before it, by method; None if no run watched one.

    The final average with the gallery embedded again after every split, and with one that never is. Then, over all splits
    but the first and all seeds, the primary metric of the queries of the splits before: with the gallery that the model before
    the split had embedded (old), with the one the new model embeds (new), of new queries on the old gallery (mixed), and on
    that gallery moved by each compensation; mean drift and churn of the old gallery; and how often each verdict fell.
    """
    metric, rows = results["primary_metric"], []
    steps_of = {
        method: [step for run in results["runs"] if run["method"] == method for step in run.get("indexes", [])]
        for method in methods_of(results)
    }
    names = sorted({name for steps in steps_of.values() for step in steps for name in step["compensated"]})
    for method, steps in steps_of.items():
        if not steps:
            continue
        runs = [run for run in results["runs"] if run["method"] == method]
        again = [run["measures"][metric]["final_average"] for run in runs]
        never = [run["kept_gallery"]["measures"][metric]["final_average"] for run in runs]
        places = ("old_on_old", "new_on_new", "new_on_old")
        scores = [_mean([step[place][metric] for step in steps]) for place in places]
        scores += [_mean([step["compensated"][name][metric] for step in steps]) for name in names]
        moved = [_mean([step["drift"]["mean"] for step in steps]), _mean([step["churn"] for step in steps])]
        counts = Counter(step["verdict"] for step in steps)
        verdicts = ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common())
        rows.append([method, *map(_mean_and_deviation, (again, never)), *scores, *moved, verdicts])
    header = ["method", "embedded again", "never again", "old", "new", "mixed"]
    header += [*(f"mixed, {name}" for name in names), "drift", "churn", "verdicts"]
    return Table(f"The old index, {metric_name(metric)}", header, rows) if rows else None


def _kept(runs: Sequence[Mapping[str, Any]]) -> str:
    """What a method remembers of the data itself: "nothing", "statistics" or "data"."""
    return str(runs[0].get("keeps", "nothing"))


def _mean(values: Sequence[float]) -> str:
    return _number(float(np.mean(values)), 3)


def _mean_and_deviation(values: Sequence[float | None], digits: int = 3) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = _number(float(np.mean(numbers)), digits)
    return f"{mean} ± {_number(float(np.std(numbers, ddof=1)), digits)}" if len(numbers) > 1 else mean


def _number(value: float, digits: int) -> str:
    """A number without the zero before its point, as tables of scores are set: .435, -.296, 12.1."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
