"""Tables in the terminal."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.table import Table as RichTable

from mas_embed.report.tables import Table
from mas_embed.runtime.command_line import plain


def terminal_table(table: Table, width: int, *, align: Literal["left", "right"] = "right") -> RichTable:
    """The table for a terminal, without deviations if it is too narrow for them.

    Args:
        table: of text, means and deviations as "a ± b".
        width: of the terminal, in characters.
        align: of all columns but the first, which is aligned to the left.
    """
    if _width_of(table) > width:
        table = _with_means_alone(table)
    rich_table = RichTable(title=plain(table.title), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, name in enumerate(table.header):
        rich_table.add_column(plain(name), justify="left" if index == 0 else align, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*(plain(cell).replace(" ± ", "±") for cell in row))  # or it is broken at 80 columns
    return rich_table


def _width_of(table: Table) -> int:
    """The characters of a row in the terminal, with a space beside each cell and one before the row."""
    columns = zip(table.header, *table.rows, strict=True)
    return 1 + sum(2 + max(len(cell.replace(" ± ", "±")) for cell in column) for column in columns)


def _with_means_alone(table: Table) -> Table:
    rows = [[cell.partition(" ± ")[0] for cell in row] for row in table.rows]
    return Table(table.title.replace("mean ± deviation of", "mean of"), table.header, rows)
