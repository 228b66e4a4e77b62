"""The command line: `mas-embed run`, `check` and `report`."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from mas_embed.config import Config, load_config
from mas_embed.errors import RunError, UserError
from mas_embed.experiment import make_model, make_splits, num_trainings, run_experiment
from mas_embed.importance import explain_coverage
from mas_embed.importance.rules.products import has_compiled_products
from mas_embed.report import Table, followed_tables, join_results, split_table, summary_table, write_report

app = typer.Typer(
    help="Train embedding networks over a sequence of data splits, and see what they forget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: one whole run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override a key of the config, as in methods.mas.strength=30; repeatable.",
    ),
]


@app.command()
def run(
    config: ConfigPath,
    out: Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/<name>")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run of the same config stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the run directory.")] = False,
) -> None:
    """Train every method and seed of a config, judge them after every split, and write a report."""
    loaded = load_config(config, overrides or ())
    folder = out or Path("runs") / loaded.name
    try:
        with RunProgress(loaded) as progress:
            results = run_experiment(loaded, folder, resume=resume, overwrite=overwrite, on_event=progress)
    except KeyboardInterrupt:
        errors.print("interrupted; run it again with --resume to go on after the last finished split", soft_wrap=True)
        raise typer.Exit(130) from None
    except (UserError, RunError):
        raise
    except Exception as error:
        log = _write_traceback(folder)
        raise RunError(f"{type(error).__name__}: {error} (traceback in {log})") from error
    console.print()
    _show_tables(results)
    console.print(
        f"report  {escape(str(folder / 'report.html'))}\nfigure  {escape(str(folder / 'scores.png'))}", highlight=False
    )
    console.print(f"scores  {escape(str(folder / 'results.json'))}", highlight=False)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Validate a config, and show it resolved, with the splits and what will be trained; trains and writes nothing."""
    loaded = load_config(config, overrides or ())
    splits = make_splits(loaded)
    console.print(escape(loaded.to_yaml()), highlight=False)
    sizes = [[s.name, *(f"{len(part):,}" for part in (s.train, s.query, s.gallery))] for s in splits]
    console.print(_rich(Table("splits", ["split", "train", "query", "gallery"], sizes)))
    model = make_model(loaded, splits, seed=loaded.seeds[0])
    inputs = splits[0].train.inputs[:2]
    coverage = explain_coverage(model, inputs)
    rows = [[row.name, "x".join(map(str, row.shape)), row.layer, row.way] for row in coverage]
    console.print(_rich(Table("parameters", ["parameter", "shape", "layer", "importance by"], rows)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numel = sum(parameter.numel() for parameter in model.parameters())
    num_methods, num_seeds = len(loaded.methods), len(loaded.seeds)
    num_runs = num_methods * num_seeds
    searched = num_trainings(loaded) - num_runs
    console.print(
        f"{len(trained)} of {len(coverage)} parameters are trained ({numel:,} values in all); "
        f"{num_methods} methods x {num_seeds} seeds = {num_runs} runs"
        + (f", after {searched} trainings to choose options" if searched else ""),
        highlight=False,
    )
    if not has_compiled_products():
        console.print(
            "importance goes by a library's calls: install the package where there is a C compiler to make it faster"
        )


@app.command()
def report(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories that runs wrote.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; needed for several runs.")] = None,
) -> None:
    """Rebuild the report of a run directory from its results, or compare several runs over the same splits."""
    write_report(*run_directories, out=out)
    _show_tables(join_results(run_directories))
    console.print(f"report  {escape(str((out or run_directories[0]) / 'report.html'))}", highlight=False)


class RunProgress:
    """Shows a run as it goes: a bar with method, split, epoch, loss and time left, and a line for every run that has ended."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._num_done = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=300,  # longer than a run, so that short methods do not mislead it
        )

    def __enter__(self) -> RunProgress:
        self._task = self._progress.add_task("preparing", total=num_trainings(self._config))
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes an event of `run_experiment`."""
        getattr(self, f"_on_{event['event']}")(event)

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        epoch, epochs = event["epoch"] + 1, self._config.training.epochs
        text = f"split {event['split']}  epoch {epoch}/{epochs}  loss {event['loss']:.4f}"
        self._show(event, (event["split_index"] + epoch / epochs) / event["num_splits"], text)

    def _on_split(self, event: Mapping[str, Any]) -> None:
        self._show(event, (event["split_index"] + 1) / event["num_splits"], f"split {event['split']}  evaluated")

    def _show(self, event: Mapping[str, Any], share: float, text: str) -> None:
        description = escape(f"{event['method']}  seed {event['seed']}  {text}")
        self._progress.update(self._task, description=description, completed=self._num_done + share)

    def _on_candidate(self, event: Mapping[str, Any]) -> None:
        self._num_done += len(event["seeds"])
        options = ", ".join(f"{name}={value}" for name, value in event["options"].items())
        outcome = f"failed: {event['error']}" if event["mean"] is None else f"on validation {event['mean']:.3f}"
        self._progress.console.print(
            escape(f"{event['method']:<16} {options}  {outcome}  ({event['seconds']:.0f} s)"), highlight=False
        )

    def _on_run(self, event: Mapping[str, Any]) -> None:
        measures = event["measures"][self._config.evaluation.primary_metric]
        forgetting = f"  forgetting {measures['forgetting']:.3f}" if measures["forgetting"] is not None else ""
        seconds = sum(event["seconds"].values())
        self._num_done += 1
        line = f"{event['method']:<16} seed {event['seed']}  final average {measures['final_average']:.3f}{forgetting}"
        self._progress.console.print(escape(f"{line}  ({seconds:.0f} s)"), highlight=False)

    def _on_skip(self, event: Mapping[str, Any]) -> None:
        self._num_done += 1
        self._progress.console.print(
            escape(f"{event['method']:<16} seed {event['seed']}  done already"), highlight=False
        )


def _show_tables(results: Mapping[str, Any]) -> None:
    for table in (summary_table(results), split_table(results), *followed_tables(results)):
        console.print(_rich(table))


def _rich(table: Table) -> RichTable:
    rich_table = RichTable(title=escape(table.title), title_justify="left", box=box.SIMPLE)
    for index, name in enumerate(table.header):
        rich_table.add_column(name, justify="left" if index == 0 else "right")
    for row in table.rows:
        rich_table.add_row(*map(escape, row))
    return rich_table


def main() -> None:
    """Runs the command line: exit code 2 and one sentence for what the user can put right, 1 for a run that failed."""
    try:
        app()
    except UserError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, RunError):
            log = _write_traceback(Path(tempfile.mkdtemp(prefix="mas-embed-")))
            error = RunError(f"{type(error).__name__}: {error} (traceback in {log})")
        errors.print(f"[red]failed:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _write_traceback(folder: Path) -> Path:
    """Keeps the exception that is being handled in the folder, or in a temporary one if there is none yet."""
    path = (folder if folder.is_dir() else Path(tempfile.mkdtemp(prefix="mas-embed-"))) / "error.log"
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return path
