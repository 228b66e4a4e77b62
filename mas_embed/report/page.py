"""The report of a run directory: two pictures and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mas_embed.errors import UserError, explained
from mas_embed.evaluation import CONFIG_FILE, ENVIRONMENT_FILE, Results, join_results, read_results
from mas_embed.report.figures import png_of, scores_figure, stale_gallery_figure
from mas_embed.report.tables import (
    cost_table,
    index_table,
    pooled_table,
    selection_table,
    split_table,
    summary_table,
    tracked_tables,
)
from mas_embed.runtime.atomic_files import write_file
from mas_embed.runtime.output_folder import check_files, is_marked, mark_folder
from mas_embed.runtime.reading import read_text
from mas_embed.runtime.yaml_text import parse_yaml

TEMPLATE = "page.html.jinja"
REPORT_FILES = ("report.html", "scores.png", "stale_gallery.png")


def write_report(run_directory: str | Path, *others: str | Path, out: str | Path | None = None) -> None:
    """Writes `report.html`, `scores.png`, and `stale_gallery.png` if the index was followed, from one or several run directories.

    Args:
        run_directory: whose `results.json` is read.
        others: more of them, over the same splits, whose methods come into the same tables and pictures.
        out: where to write; None: into `run_directory`, if it is the only one.

    Raises:
        UserError: there are no results to report, the runs cannot be compared, there is no `out` for several, or `out` holds
            other files of these names.
        RunError: the disk is full.
    """
    folders = [Path(folder) for folder in (run_directory, *others)]
    if out is None and others:
        raise UserError("a report of several runs needs another directory: give --out")
    target = folders[0] if out is None else Path(out)
    results = read_runs(folders)
    if not results.runs:
        raise UserError(f"{folders[0]} holds no finished run to report")
    is_ours = target in folders or is_marked(target)
    check_files(target, REPORT_FILES, is_ours=is_ours)
    with explained(f"the results in {', '.join(map(str, folders))}"):
        files = render(
            results,
            config="\n".join(_text(folder / CONFIG_FILE) for folder in folders),
            environment="\n".join(_text(folder / ENVIRONMENT_FILE) for folder in folders),
        )
    if not is_ours:
        mark_folder(target, {"report_of": [str(folder) for folder in folders]})
    for name, content in files.items():
        write_file(target / name, content)


def render(results: Results, *, config: str = "", environment: str = "") -> dict[str, bytes]:
    """The page and the pictures, by the name of the file.

    Args:
        results: with at least one run.
        config: the text of the config, which the page shows; "" leaves it out.
        environment: the text about the machine and the versions, which the page shows; "" leaves it out.
    """
    index = index_table(results)
    pictures = {"scores": png_of(scores_figure(results))}
    if index is not None:
        pictures["stale_gallery"] = png_of(stale_gallery_figure(results))
    template = Environment(autoescape=True, loader=PackageLoader("mas_embed.report", "")).get_template(TEMPLATE)
    html = template.render(
        name=results.name,
        summary=summary_table(results),
        not_measured=_not_measured(results),
        by_split=split_table(results),
        tracked=tracked_tables(results),
        scores_picture=_base64(pictures["scores"]),
        index=index,
        stale_picture=_base64(pictures.get("stale_gallery", b"")),
        pooled=pooled_table(results),
        cost=cost_table(results),
        selection=selection_table(results),
        config=config,
        environment=environment,
    )
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    # Names of folders may hold bytes that are no UTF-8
    return files | {"report.html": html.encode(errors="backslashreplace")}


def read_runs(folders: Sequence[Path]) -> Results:
    """The results of several run directories as those of one.

    Raises:
        UserError: the runs are not of the same data and splits, or not of the same primary metric.
    """
    results = {str(folder): read_results(folder) for folder in folders}
    for folder in folders:
        if _data_of(folder) != _data_of(folders[0]):
            raise UserError(f"{folder} is of other data than {folders[0]}, as their configs say; they do not compare")
    return join_results(results)


def _not_measured(results: Results) -> str:
    """A sentence about scores that were not measured; empty if all were."""
    num_splits = len(results.splits)
    counts = {run.num_averaged.get("learning", num_splits) for run in results.runs if len(run.details) == num_splits}
    counts -= {num_splits}
    if not counts:
        return ""
    return f"Not every split was evaluated after every split: learning is a mean over {min(counts)} of {num_splits} splits."


def _data_of(folder: Path) -> Any:
    """What the config of a run says of its data."""
    path = folder / CONFIG_FILE
    config = parse_yaml(_text(path), f"{path} is damaged, it is not YAML")
    return config.get("data") if isinstance(config, dict) else None


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _text(path: Path) -> str:
    return read_text(path, "the file") if path.exists() else ""
