"""What is there of a run that is still going, or that has stopped: the trainings that have not ended, from their logs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mas_embed.report.page_tables import NOTHING, Cell, Column, PageTable
from mas_embed.report.run_files import RunFiles
from mas_embed.report.tables import metric_name, number


def unfinished_sentence(num_done: int, run_files: Sequence[RunFiles]) -> str:
    """A sentence about trainings that have not ended; empty if all have, or if it is not known how many there are."""
    planned = sum(files.num_trainings for files in run_files)
    if num_done >= planned:
        return ""
    return f"{num_done} of {planned} trainings have ended. The page shows what is there; `mas-embed report` makes it again."


def progress_table(run_files: Sequence[RunFiles], done: Collection[tuple[str, str]], metric: str) -> PageTable | None:
    """The trainings that have a log but no results yet; None if there is none.

    Args:
        run_files: of every run directory.
        done: method and seed of those with results.
        metric: of the scores.
    """
    logs = [log for files in run_files for log in files.logs if (log.method, log.seed) not in done and log.num_splits]
    if not logs:
        return None
    columns = [
        Column("training", is_text=True),
        Column("splits learned"),
        Column("epoch", "of the split that was last seen"),
        Column("loss", "of that epoch, without penalties"),
        Column("score", f"mean {metric_name(metric)} of the splits learned so far", "high"),
    ]
    rows = []
    for log in logs:
        last = log.epochs[-1] if log.epochs else None
        scores = log.splits[-1].scores.get(metric) if log.splits else None
        measured = [score for score in (scores or [])[: len(log.splits)] if score is not None]
        mean = sum(measured) / len(measured) if measured else None
        loss = last.loss if last else None
        rows.append(
            [
                Cell(f"{log.method}, seed {log.seed}"),
                Cell(f"{len(log.splits)} of {log.num_splits}", value=float(len(log.splits))),
                Cell(f"{last.epoch + 1} of {last.split}" if last else NOTHING),
                Cell(NOTHING if loss is None else f"{loss:.4g}", value=loss),
                Cell(NOTHING if mean is None else number(mean, 3), value=mean),
            ]
        )
    return PageTable("Trainings that have not ended", columns, rows)
