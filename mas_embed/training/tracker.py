"""Trainings in TensorBoard, Weights & Biases, MLflow and the other experiment trackers that `accelerate` knows."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mas_embed.errors import UserError, explained, unknown_name
from mas_embed.runtime.checks import as_whole_number, check_at_least
from mas_embed.runtime.distributed import process_rank
from mas_embed.training.callbacks import CALLBACKS, Callback, Event, RunEnd, SplitEnd, StepEnd

_WITH_EXTRA = ("tensorboard", "wandb", "mlflow")
# By tracker the arguments that name a run and its folder, where they are not the first ones of accelerate's class
_NAME_OF_RUN = {
    "wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name", "swanlab": "experiment_name",
}  # fmt: skip
_FOLDER_OF_RUN = {"wandb": "dir", "swanlab": "logdir", "dvclive": "dir"}


@CALLBACKS.register("tracker")
class Tracker(Callback):
    """Logs a training with an experiment tracker, a run of its own for every method and seed.

    Logged are loss, penalty, the share of the penalty in their sum, learning rate and gradient norm of every n-th batch; the
    scores of all splits after every split; final average and forgetting in the end; and the config as hyper-parameters. Steps are
    counted over all splits, also by a training that is resumed.

    Args:
        folder: that is written into; in a config, the folder of the run.
        log_with: "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab" or "trackio", or the name
            of a class that was registered with `accelerate.tracking.register_tracker_class`.
        project: under which a tracker collects runs; in a config, the name of the config.
        every: n >= 1.
        logging_dir: where the tracker writes its files; None for `folder`.
        options: further arguments of the tracker, as of `wandb.init`.
        config: the hyper-parameters; in a config, all of it.

    Raises:
        UserError: there is no such tracker, or its library is not installed; `every` is below 1.
    """

    wants_gradient_norm = True

    def __init__(
        self,
        folder: str | Path,
        *,
        log_with: str,
        project: str | None = None,
        every: int = 10,
        logging_dir: str | None = None,
        options: dict[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_at_least("every", every, 1)
        self._class = _class_of(log_with)
        self._folder, self._name, self._every = Path(folder), log_with, every
        self._project, self._logging_dir = project or str((config or {}).get("name", "mas-embed")), logging_dir
        self._options, self._config = dict(options or {}), dict(config or {})
        self._tracker: Any = None
        self._num_steps, self._is_resumed = 0, False
        self._id = "" if log_with == "mlflow" else uuid.uuid4().hex  # MLflow gives the name itself

    def state_dict(self) -> dict[str, Any]:
        """The batches of all splits so far, and the name by which some trackers find a run again."""
        return {"num_steps": self._num_steps, "id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._num_steps = as_whole_number("the steps of a tracker in a checkpoint", state.get("num_steps"), 0)
        self._id, self._is_resumed = str(state.get("id", "")), True

    def on_step_end(self, event: StepEnd) -> None:
        self._num_steps += 1
        self._begin(event)
        if event.step % self._every or self._tracker is None:
            return
        loss, penalty = float(event.loss), float(event.penalty)
        values = {"loss": loss, "penalty": penalty, "learning_rate": event.learning_rate, "epoch": event.epoch}
        if loss + penalty > 0:
            values["penalty_share"] = penalty / (loss + penalty)
        if event.gradient_norm is not None:
            values["gradient_norm"] = float(event.gradient_norm)
        self._log({f"train/{name}": value for name, value in values.items()})

    def on_split_end(self, event: SplitEnd) -> None:
        self._begin(event)
        scores = event.evaluation.scores.items()
        self._log({f"{metric}/split {index + 1}": one for metric, row in scores for index, one in enumerate(row)})

    def on_run_end(self, event: RunEnd) -> None:
        self._begin(event)
        matrices, names = event.record.scores.items(), ("final_average", "forgetting")
        self._log({f"{metric}/{name}": getattr(matrix, name) for metric, matrix in matrices for name in names})

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()
        self._tracker = None

    def _log(self, values: Mapping[str, float]) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if finite and self._tracker is not None:
            self._tracker.log(finite, step=self._num_steps)

    def _begin(self, event: Event) -> None:
        """Starts the tracker when the first event comes, which says what is trained."""
        if self._tracker is not None or process_rank() != 0:
            return
        with explained(f"callbacks.tracker with {self._name}"):
            tracker = self._class(*self._arguments(event), **{**self._keywords(event), **self._options})
            if hasattr(tracker, "start"):
                tracker.start()
            self._tracker = tracker
            if not self._is_resumed:
                tracker.store_init_configuration(self._hyper_parameters(event))
            if self._name == "mlflow":
                self._id = tracker.tracker.info.run_id

    def _arguments(self, event: Event) -> list[str]:
        """The name of the run, or of the project that it belongs to, and the folder, as accelerate's class takes them."""
        folder = self._folder if self._logging_dir is None else Path(self._logging_dir)
        if self._name == "tensorboard":  # makes a folder of the name
            inside = "tensorboard" if self._logging_dir is None else f"{self._project}/{event.method}/seed{event.seed}"
            return [inside, str(folder)]
        name = self._project if self._name in _NAME_OF_RUN else f"{self._project} {event.method} seed {event.seed}"
        return [name, str(folder)] if self._class.requires_logging_directory else [name]

    def _keywords(self, event: Event) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        if self._name in _NAME_OF_RUN:
            keywords[_NAME_OF_RUN[self._name]] = f"{event.method} seed {event.seed}"
        if self._name in _FOLDER_OF_RUN:
            folder = self._folder / self._name if self._logging_dir is None else Path(self._logging_dir)
            folder.mkdir(parents=True, exist_ok=True)
            keywords[_FOLDER_OF_RUN[self._name]] = str(folder)
        if self._name == "wandb":
            keywords |= {"id": self._id, "resume": "allow"}
        if self._name == "mlflow" and self._id:
            keywords["run_id"] = self._id
        if (
            self._name == "tensorboard"
        ):  # what an interrupted training has logged of steps that are trained again is hidden
            keywords["purge_step"] = self._num_steps
        return keywords

    def _hyper_parameters(self, event: Event) -> dict[str, bool | int | float | str]:
        """The config with this method and seed only, as one value for each path of keys."""
        methods = [one for one in self._config.get("methods", ()) if event.method == (one.get("label") or one["name"])]
        others = {key: value for key, value in self._config.items() if key not in ("methods", "seeds")}
        return _flat({**others, "method": methods[0] if methods else event.method, "seed": event.seed})


def _class_of(name: str) -> Any:
    """The class of a tracker; raises `UserError` if there is none, or its library is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    classes = {str(key): one for key, one in LOGGER_TYPE_TO_CLASS.items()}
    if name not in classes:
        raise unknown_name("tracker in log_with", name, classes)
    if classes[name].__module__.startswith("accelerate."):
        try:
            import_module(name)
        except ImportError as error:
            package = f"'mas-embed[{name}]'" if name in _WITH_EXTRA else name
            raise UserError(
                f"log_with={name} needs {name}, which cannot be imported ({error}); install it with pip install {package}"
            ) from error
    return classes[name]


def _flat(value: Any, path: str = "") -> dict[str, bool | int | float | str]:
    if isinstance(value, Mapping) and value:
        pairs = [_flat(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()]
        return {key: leaf for pair in pairs for key, leaf in pair.items()}
    return {path: value if isinstance(value, bool | int | float | str) else str(value)}
