"""Figures, tables and one HTML page; reads a run directory, and nothing of training."""

from mas_embed.report.figures import old_index_figure, scores_figure
from mas_embed.report.page import join_results, read_results, write_report
from mas_embed.report.tables import (
    Table,
    cost_table,
    followed_tables,
    old_index_table,
    selection_table,
    split_table,
    summary_table,
)

__all__ = [
    "Table",
    "cost_table",
    "followed_tables",
    "join_results",
    "old_index_figure",
    "old_index_table",
    "read_results",
    "scores_figure",
    "selection_table",
    "split_table",
    "summary_table",
    "write_report",
]
