"""A progress bar for one or several trainings, in a terminal of 80 columns or more."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from mas_embed.runtime.text import printable
from mas_embed.training.callbacks import Callback, EpochEnd, Event, RunEnd, SplitEnd


class ProgressBar(Callback):
    """Shows a bar in the terminal with the time that is left, and under it where each training stands. A context manager.

    Args:
        num_runs: how many trainings will be shown.
        console: of `rich`; None for one on the standard output.

    Examples:
        >>> with ProgressBar() as progress:  # doctest: +SKIP
        ...     train_sequence(model, splits, method=method, loss=loss, callbacks=[progress])
    """

    def __init__(self, *, num_runs: int = 1, console: Any = None) -> None:
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,  # longer than a run, so that short methods do not mislead it
        )
        self._num_runs, self._num_done = num_runs, 0
        self._shares: dict[tuple[str, int], float] = {}  # of the trainings that are going on, by method and seed
        self._lines: dict[tuple[str, int], str] = {}
        self._live = Live(get_renderable=self._shown, console=self._bar.console, transient=True, refresh_per_second=4)
        self._task = self._bar.add_task("", total=num_runs)
        self._update()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def finish(self, method: str, seed: int) -> None:
        """Counts a training as done, whether or not its epochs were shown."""
        self._shares.pop((method, seed), None)
        self._lines.pop((method, seed), None)
        self._num_done += 1
        self._update()

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        from rich.markup import escape

        self._live.console.print(escape(printable(line)), highlight=False)

    def on_epoch_end(self, event: EpochEnd) -> None:
        epoch = event.epoch + 1
        share = (event.split_index + epoch / event.num_epochs) / event.num_splits
        self._show(event, share, f"epoch {epoch}/{event.num_epochs}  loss {event.loss:.4f}")

    def on_split_end(self, event: SplitEnd) -> None:
        self._show(event, (event.split_index + 1) / event.num_splits, "evaluated")

    def on_run_end(self, event: RunEnd) -> None:
        self.finish(event.method, event.seed)

    def _show(self, event: Event, share: float, text: str) -> None:
        key = event.method, event.seed
        self._shares[key] = share
        position = f"split {event.split_index + 1}/{event.num_splits} ({event.split})"
        self._lines[key] = printable(f"{event.method}  seed {event.seed}  {text}  {position}")
        self._update()

    def _update(self) -> None:
        description = f"{self._num_done} of {self._num_runs} trained" if self._lines or self._num_done else "preparing"
        self._bar.update(self._task, description=description, completed=self._num_done + sum(self._shares.values()))

    def _shown(self) -> Any:
        """The bar, and a line for every training that is going on."""
        from rich.console import Group
        from rich.text import Text

        lines = list(self._lines.values())
        return Group(self._bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
