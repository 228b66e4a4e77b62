"""The trained model of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mas_embed.config import read_yaml, validate_config
from mas_embed.errors import UserError, unknown_name
from mas_embed.evaluation import CONFIG_FILE, read_results
from mas_embed.experiment.imports import import_modules
from mas_embed.experiment.run_directory import CHECKPOINT_FILE, MODEL_FILE, folder_name
from mas_embed.experiment.saved_model import SavedModel, load_model
from mas_embed.runtime.checks import as_whole_number
from mas_embed.training import has_checkpoint, read_last_checkpoint


def load_run(directory: str | Path, *, method: str, seed: int = 0, imports: Sequence[str] = ()) -> SavedModel:
    """The trained model and the method of one method and seed of a run, from its file `model.safetensors`.

    The file is written when a training has ended. Of a training that was stopped before, there is none; of one that goes on
    with appended splits, it holds the model before these.

    Args:
        directory: of the run, such as "runs/digits".
        method: its label or name in the config.
        seed: of the training.
        imports: modules that register components of the run, as those of `--import`; from the working directory or an installed
            package.

    Returns:
        Model, method, and what is known of the splits that were learned; see `load_model`, by which a file of a run is loaded
        into a model of your own.

    Raises:
        UserError: there is no run, it has no such method or seed, or the training has not finished; or as `load_model`.
    """
    directory = Path(directory)
    import_modules(imports, given_by="imports")
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"there is no run in {directory}; name the directory that mas-embed run has written")
    config = validate_config(read_yaml(directory / CONFIG_FILE))
    titles = [one.title for one in config.methods]
    with suppress(UserError):  # a method that is left out when splits are appended has results all the same
        titles += [title for title in read_results(directory).methods if title not in titles]
    if method not in titles:
        raise unknown_name("method", method, titles)
    if as_whole_number("seed", seed) not in config.seeds:
        raise UserError(f"the run in {directory} has no seed {seed} (seeds: {', '.join(map(str, config.seeds))})")
    folder = directory / folder_name(method) / f"seed{seed}"
    if not (folder / MODEL_FILE).exists():
        raise UserError(_not_finished(directory, folder, f"{method} seed {seed}"))
    return load_model(folder / MODEL_FILE)


def _not_finished(directory: Path, folder: Path, title: str) -> str:
    """Why there is no model in the folder of a training."""
    remedy = f"finish it by: mas-embed run {directory / CONFIG_FILE} --out {directory} --resume"
    if not has_checkpoint(folder / CHECKPOINT_FILE):
        return f"{title} of the run in {directory} has learned no split yet, so there is no model; {remedy}"
    _, progress = read_last_checkpoint(folder / CHECKPOINT_FILE)
    names = progress.get("plan", {}).get("splits", [])
    num_learned = len(progress.get("scores", []))
    if num_learned < len(names):
        return f"{title} of the run in {directory} has learned {num_learned} of {len(names)} splits; {remedy}"
    return f"{folder / MODEL_FILE} is missing; train {title} again, or bring the file back"
