"""The report of a run directory: pictures, and one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files as resources
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from mas_embed.errors import UserError, explained
from mas_embed.evaluation import RESULTS_FILE, Results, join_results, read_results
from mas_embed.report.drawing import png_of
from mas_embed.report.map_figures import check_map_method
from mas_embed.report.run_files import RunFiles, read_run_files
from mas_embed.report.sections import sections_of
from mas_embed.report.tables import number
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.output_folder import check_files, is_marked, mark_folder

TEMPLATE = "page.html.jinja"
PICTURES = ("scores", "kept", "trade_off", "confused", "layers", "map", "stale_gallery")
REPORT_FILES = ("report.html", *(f"{name}.png" for name in PICTURES))


def write_report(
    run_directory: str | Path,
    *others: str | Path,
    out: str | Path | None = None,
    map_method: str = "pca",
    changes_of: Callable[[str], str | None] = lambda config: None,
) -> None:
    """Writes `report.html` and its pictures as PNG files, from one or several run directories.

    A run that is still going has a report of what is there.

    Args:
        run_directory: whose `results.json` is read, and what else it holds.
        others: more of them, over the same splits, whose methods come into the same tables and pictures.
        out: where to write; None: into `run_directory`, if it is the only one.
        map_method: how embeddings are drawn in two dimensions: "pca", "tsne", or "umap", which needs umap-learn.
        changes_of: gives the part of a config that is not the default, from the text of the config; or None if it is not known.

    Raises:
        UserError: there are no results to report, the runs cannot be compared, there is no `out` for several, or `out` holds
            other files of these names; the map cannot be drawn by this method.
        RunError: the disk is full.
    """
    check_map_method(map_method)
    folders = [Path(folder) for folder in (run_directory, *others)]
    if out is None and others:
        raise UserError("a report of several runs needs another directory: give --out")
    target = folders[0] if out is None else Path(out)
    results = results_so_far(folders)
    run_files = _files_of(folders, results, changes_of)
    if not results.runs and not any(files.logs for files in run_files):
        raise UserError(f"{folders[0]} holds no finished run to report")
    is_ours = target in folders or is_marked(target)
    check_files(target, REPORT_FILES, is_ours=is_ours)
    with explained(f"the results in {', '.join(map(str, folders))}"):
        files = render(results, run_files, map_method=map_method)
    if not is_ours:
        mark_folder(target, {"report_of": [str(folder) for folder in folders]})
    for name, content in files.items():
        write_file(target / name, content)


def render(results: Results, run_files: Sequence[RunFiles] = (), *, map_method: str = "pca") -> dict[str, bytes]:
    """The page and the pictures, by the name of the file.

    Args:
        results: of the runs; those without a run have a page of what the logs hold.
        run_files: what else is known of each run directory.
        map_method: how embeddings are drawn in two dimensions.
    """
    sections, figures = sections_of(results, run_files, map_method)
    environment = Environment(autoescape=True, loader=PackageLoader("mas_embed.report", ""))
    environment.filters["score"] = partial(number, digits=2)
    html = environment.get_template(TEMPLATE).render(
        name=results.name, style=_asset("page.css"), script=_asset("page.js"), **sections
    )
    files = {f"{name}.png": png_of(figure) for name, figure in figures.items()}
    # Names of folders may hold bytes that are no UTF-8
    return files | {"report.html": html.encode(errors="backslashreplace")}


def read_runs(folders: Sequence[Path]) -> Results:
    """The results of several run directories as those of one.

    Raises:
        UserError: the runs are not of the same data and splits, or not of the same primary metric.
    """
    results = {str(folder): read_results(folder) for folder in folders}
    data = [read_run_files(folder, None, {}).settings.get("data") for folder in folders]
    for folder, one in zip(folders, data, strict=True):
        if one != data[0]:
            raise UserError(f"{folder} is of other data than {folders[0]}, as their configs say; they do not compare")
    return join_results(results)


def results_so_far(folders: Sequence[Path]) -> Results:
    """The results of the runs; those of a single run that has written none yet are empty."""
    path = folders[0] / RESULTS_FILE
    if len(folders) > 1 or path.exists():
        return read_runs(folders)
    files = read_run_files(folders[0], None, {})
    splits = {line.split_index: line.split for log in files.logs for line in (*log.epochs, *log.splits)}
    evaluation = files.settings.get("evaluation")
    metric = evaluation.get("primary_metric") if isinstance(evaluation, dict) else None
    name = files.settings.get("name")
    if not splits or not isinstance(metric, str) or not isinstance(name, str):
        return read_runs(folders)  # which says that there is nothing
    return Results(name=name, splits=[splits[index] or "?" for index in sorted(splits)], primary_metric=metric)


def _files_of(folders: Sequence[Path], joined: Results, changes_of: Callable[[str], str | None]) -> list[RunFiles]:
    """What else every run directory holds, with the titles of methods that the joined results have."""
    found, position = [], 0
    for folder in folders:
        if not joined.runs:
            found.append(read_run_files(folder, None, {}, changes_of))
            continue
        results = read_results(folder)
        renamed = joined.runs[position : position + len(results.runs)]
        titles = {run.method: new.method for run, new in zip(results.runs, renamed, strict=True)}
        found.append(read_run_files(folder, results, titles, changes_of))
        position += len(results.runs)
    return found


def _asset(name: str) -> Markup:
    """A file of this package that is embedded in the page as it is."""
    return Markup((resources("mas_embed.report") / name).read_text(encoding="utf-8"))  # noqa: S704 (our own file)
