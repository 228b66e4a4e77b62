"""Tables, figures and one HTML page; reads the results in run directories, and nothing of training."""

from mas_embed.report.figures import scores_figure
from mas_embed.report.index_figures import stale_gallery_figure
from mas_embed.report.page import REPORT_FILES, read_runs, render, results_so_far, write_report
from mas_embed.report.tables import (
    Table,
    cost_table,
    index_table,
    metric_name,
    pooled_table,
    selection_table,
    split_table,
    summary_table,
    tracked_tables,
    unseen_table,
)
from mas_embed.report.terminal_tables import terminal_table

__all__ = [
    "REPORT_FILES",
    "Table",
    "cost_table",
    "index_table",
    "metric_name",
    "pooled_table",
    "read_runs",
    "render",
    "results_so_far",
    "scores_figure",
    "selection_table",
    "split_table",
    "stale_gallery_figure",
    "summary_table",
    "terminal_table",
    "tracked_tables",
    "unseen_table",
    "write_report",
]
