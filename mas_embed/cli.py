"""The command line: `mas-embed run`, `check`, `report` and `list`."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import io
import math
import os
import sys
import tempfile
import traceback
import webbrowser
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from mas_embed.config import changed_options, described_options, load_config
from mas_embed.data import DATASETS, TRANSFORMS, ordered_batches
from mas_embed.errors import RunError, UserError, reason_of, unknown_name
from mas_embed.evaluation import EVALUATORS, Results, RunRecord
from mas_embed.experiment import (
    ALL_CORES,
    ERROR_FILE,
    RunProgress,
    build_model,
    build_splits,
    cluster,
    default_directory,
    dry_run,
    import_modules,
    num_trainings,
    run_experiment,
    write_into_run_directory,
)
from mas_embed.importance import explain_coverage
from mas_embed.importance.rules.absolute_products import has_compiled_products
from mas_embed.losses import LOSSES, MINERS
from mas_embed.methods import METHODS
from mas_embed.models import MODELS
from mas_embed.registry import Registry
from mas_embed.report import (
    Table,
    results_so_far,
    split_table,
    summary_table,
    terminal_table,
    tracked_tables,
    unseen_table,
    write_report,
)
from mas_embed.retrieval import COMPENSATIONS
from mas_embed.runtime.command_line import PipedConsole, command_of, plain, resuming_command
from mas_embed.runtime.distributed import is_error_of_first, launched_processes, launched_rank, reason_of_loss
from mas_embed.runtime.shown_warnings import warnings_as_sentences
from mas_embed.runtime.signals import INTERRUPTED, TERMINATED, Terminated, exit_codes_of_signals
from mas_embed.runtime.text import printable, shortened
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS

# By the name under which `mas-embed list` shows them
KINDS: dict[str, Registry] = {
    "datasets": DATASETS,
    "transforms": TRANSFORMS,
    "models": MODELS,
    "losses": LOSSES,
    "methods": METHODS,
    "evaluators": EVALUATORS,
    "samplers": SAMPLERS,
    "miners": MINERS,
    "optimizers": OPTIMIZERS,
    "schedulers": SCHEDULERS,
    "callbacks": CALLBACKS,
    "compensations": COMPENSATIONS,
}

app = typer.Typer(
    help="Train embedding networks over a sequence of data splits, and see what they forget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
LONGEST_SENTENCE = 1000  # characters of an error
WARNING = "[yellow]warning:[/yellow] "


class _StopError(Exception):
    """The program ends with an exit code and a sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


console = PipedConsole()
errors = PipedConsole(stderr=True)


def _folder(text: str) -> Path:
    if not text.strip():
        raise typer.BadParameter("it is empty; name a folder, or . for this one")
    return Path(text)


def _jobs(text: str) -> int:
    if text == "auto":
        return ALL_CORES
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"'{printable(text)}' is neither a number nor auto") from None


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: one whole run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override a key of the config, as in methods.mas.strength=30; repeatable.",
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module that registers components, from the working directory or an installed package; repeatable.",
    ),
]

Jobs = Annotated[
    int | None,
    typer.Option(
        help="Trainings that run side by side; auto: one for each core.", show_default="1", metavar="N", parser=_jobs
    ),
]


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train embedding networks over a sequence of data splits, and see what they forget."""
    if version:
        _print(f"mas-embed {importlib.metadata.version('mas-embed')}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit(2)


@app.command()
def run(
    config: ConfigPath,
    out: Annotated[
        Path | None,
        typer.Option(help="The run directory.", show_default="runs/<name>", metavar="DIR", parser=_folder),
    ] = None,
    overrides: Overrides = None,
    imports: Imports = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run of the same config stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the run directory.")] = False,
    jobs: Jobs = None,
    backend: Annotated[
        str | None, typer.Option(help="Train on a cluster: dask or ray.", show_default="this machine", metavar="NAME")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of the cluster: tcp://host:8786.", metavar="ADDRESS")] = None,
) -> None:
    """Train every method and seed of a config, evaluate them after every split, and write a report."""
    import_modules(imports)
    loaded = load_config(config, overrides or ())
    folder = default_directory(loaded) if out is None else out
    jobs = (ALL_CORES if backend else 1) if jobs is None else jobs
    run_it = partial(run_experiment, resume=resume, overwrite=overwrite, jobs=jobs, imports=imports or ())
    run_it = partial(run_it, command=command_of(sys.argv))
    try:
        with cluster(backend, address), RunProgress(loaded, console) as progress:
            results = run_it(loaded, folder, callbacks=[progress])
    except (KeyboardInterrupt, Terminated) as stop:
        word, code = ("interrupted", INTERRUPTED) if isinstance(stop, KeyboardInterrupt) else ("terminated", TERMINATED)
        word += (
            reason_of_loss() if code == TERMINATED else ""
        )  # a launcher ends the others when it has lost one process
        raise _StopError(code, f"{word}; go on with: {resuming_command(sys.argv)}") from None
    except (UserError, RunError):
        raise
    except Exception as error:
        raise _failure(error, folder if launched_rank() == 0 else None) from error
    console.print()
    _show_tables(results)
    for title, name in (("report", "report.html"), ("figure", "scores.png"), ("scores", "results.json")):
        _print(f"{title}  {folder / name}")
    best = _best_run(results)
    _print(
        f"next    mas_embed.load_run({str(folder)!r}, method={best.method!r}, seed={best.seed}) loads a model in Python"
    )
    _print("        append splits to the config and pass --resume to go on")


def _best_run(results: Results) -> RunRecord:
    """The run with the highest final average, of those that were trained split by split if there are any."""
    runs = [run for run in results.runs if len(run.scores[results.primary_metric]) == len(results.splits)]
    return max(runs or results.runs, key=lambda run: run.measures[results.primary_metric]["final_average"] or -math.inf)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, imports: Imports = None) -> None:
    """Validate a config, and show it resolved, with the splits and what will be trained; trains and writes nothing."""
    import_modules(imports)
    loaded = load_config(config, overrides or ())
    splits = build_splits(loaded)
    dry_run(loaded, splits)
    console.print(escape(loaded.to_yaml()), highlight=False, soft_wrap=True)
    sizes = [[s.name, *(f"{len(part):,}" for part in (s.train, s.query, s.gallery))] for s in splits]
    _show(Table("splits", ["split", "train", "query", "gallery"], sizes))
    model = build_model(loaded, splits, seed=loaded.seeds[0])
    first_batch = next(iter(ordered_batches(splits[0].train, batch_size=2)))
    coverage = explain_coverage(model, first_batch)
    rows = [[row.name, "x".join(map(str, row.shape)), row.layer, row.kind] for row in coverage.rows]
    _show(Table("parameters", ["parameter", "shape", "layer", "importance by"], rows))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    num_values = sum(parameter.numel() for parameter in model.parameters())
    num_methods, num_seeds = len(loaded.methods), len(loaded.seeds)
    searched = num_trainings(loaded) - num_methods * num_seeds
    _print(
        f"{len(trained)} of {len(coverage)} parameters are trained ({num_values:,} values in all); "
        f"{num_methods} methods x {num_seeds} seeds = {num_methods * num_seeds} runs"
        + (f", after {searched} trainings to choose options" if searched else "")
    )
    if not has_compiled_products():
        console.print(
            "importance is computed without compiled code: install the package where there is a C compiler to make it faster"
        )


@app.command()
def report(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories that runs wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; needed for several runs.", metavar="DIR", parser=_folder),
    ] = None,
    map_method: Annotated[
        str,
        typer.Option("--map", help="How the map of embeddings is made: pca, tsne or umap.", metavar="METHOD"),
    ] = "pca",
    is_opened: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    imports: Imports = None,
) -> None:
    """Rebuild the report of a run directory, also of one that is still going, or compare several runs over the same splits."""
    import_modules(imports)  # without its components, a config is shown as a whole and not only what it changes
    write_report(*run_directories, out=out, map_method=map_method, changes_of=changed_options)
    results = results_so_far(run_directories)
    if results.runs:
        _show_tables(results)
    page = (out or run_directories[0]) / "report.html"
    _print(f"report  {page}")
    if is_opened and not webbrowser.open(page.resolve().as_uri()):
        _print("there is no browser that could be started here; open the page in one yourself")


@app.command("list")
def list_components(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(KINDS))] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A component of that kind.")] = None,
    imports: Imports = None,
) -> None:
    """Show the components that a config can name: the kinds, the components of a kind, or the options of one."""
    import_modules(imports)
    kind = _plural(kind)
    if kind is None:
        rows = [[name_of_kind, ", ".join(sorted(registry))] for name_of_kind, registry in KINDS.items()]
        _show(Table("components", ["kind", "names"], rows), align="left")
    elif name is None:
        described = sorted(KINDS[kind].items())
        rows = [[component, _docstring(constructor).partition("\n")[0]] for component, constructor in described]
        _show(Table(kind, ["name", "description"], rows), align="left")
    else:
        _show_component(name, KINDS[kind])


def _plural(kind: str | None) -> str | None:
    """The name of a kind in `KINDS`, from that or from its singular."""
    singulars = {registry.kind.replace(" ", ""): name for name, registry in KINDS.items()}
    kind = singulars.get(str(kind), kind)
    if kind is not None and kind not in KINDS:
        raise unknown_name("kind of component", kind, KINDS)
    return kind


def _show_component(name: str, registry: Registry) -> None:
    rows = described_options(registry[name], registry.kind)
    _show(Table(f"{registry.kind} '{name}'", ["option", "default", "type"], rows), align="left")
    console.print(escape(_docstring(registry[name])), highlight=False)


def _docstring(constructor: object) -> str:
    """That of the class or function itself, not of a base class."""
    return inspect.cleandoc(constructor.__doc__ or "")


def _show_tables(results: Results) -> None:
    for table in (summary_table(results), split_table(results), unseen_table(results), *tracked_tables(results)):
        if table is not None:
            _show(table)


def _show(table: Table, *, align: Literal["left", "right"] = "right") -> None:
    console.print(terminal_table(table, console.width, align=align))


def _print(line: str) -> None:
    console.print(plain(line), highlight=False, soft_wrap=True)


def _print_error(sentence: str, kind: str = "", *, is_alike: bool = False) -> None:
    who = f"process {launched_rank()} of {launched_processes()}: " if launched_rank() > 0 else ""
    if not (who and is_alike):  # what all processes say alike is said by the first one
        errors.print(f"{kind}{who}{plain(shortened(sentence, LONGEST_SENTENCE))}", highlight=False, soft_wrap=True)


def main() -> None:
    """Runs the command line, and exits.

    The exit code is 0; 2, with one sentence, for what the user can put right; 1 for a run that failed or a full disk; 130 for
    Ctrl-C and 143 for SIGTERM.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only
    console.quiet = launched_rank() > 0  # the first of several processes speaks for all
    with exit_codes_of_signals(), warnings_as_sentences(partial(_print_error, kind=WARNING, is_alike=True)):
        sys.exit(_run())


def _run() -> int:
    """Runs the command line; returns the exit code."""
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:
            _print_error("interrupted")
        return code
    except _StopError as stop:
        _print_error(str(stop), is_alike=True)
        return stop.code
    except UserError as error:
        if not is_error_of_first(error):
            _print_error(str(error), "[red]error:[/red] ")
        return 2
    except Exception as error:
        if is_error_of_first(error):
            return 1
        if hasattr(error, "format_message"):  # of typer: an unknown option, or a missing argument
            _print_error(f"{error.format_message().rstrip('.')} (see mas-embed --help)", "[red]error:[/red] ")
            return 2
        failure = error if isinstance(error, RunError) else _failure(error)
        _print_error(str(failure), "[red]failed:[/red] ")
        return 1


def _failure(error: Exception, run_directory: Path | None = None) -> RunError:
    """What nobody has foreseen, as one sentence that says where its traceback was written."""
    text = "".join(traceback.format_exception(error))
    try:
        path = run_directory and write_into_run_directory(run_directory, ERROR_FILE, text)
        if not path:
            path = Path(tempfile.mkdtemp(prefix="mas-embed-")) / ERROR_FILE
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        where = f"traceback in {path}"
    except (OSError, UserError, RunError):
        where = "its traceback could not be written"
    return RunError(f"{type(error).__name__}: {reason_of(error)} ({where})")


if __name__ == "__main__":
    main()
