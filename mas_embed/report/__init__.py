"""Figures, tables and one HTML page; reads a run directory, and nothing of training."""

from mas_embed.report.figures import scores_figure
from mas_embed.report.page import read_results, write_report
from mas_embed.report.tables import Table, followed_tables, split_table, summary_table

__all__ = [
    "Table",
    "followed_tables",
    "read_results",
    "scores_figure",
    "split_table",
    "summary_table",
    "write_report",
]
