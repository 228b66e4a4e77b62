"""Writes what a training records for the report, beside its log: what the evaluator saw, the parameters, and the memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mas_embed.data import Split
from mas_embed.evaluation import (
    QUANTILES,
    RECORDING_FILES,
    Evaluator,
    RecordedParameters,
    Recording,
    observations_of,
    write_parameters,
    write_recording,
    write_resources,
)
from mas_embed.experiment.build import Training
from mas_embed.methods import Method
from mas_embed.training import Callback, EpochEnd, Event, RunEnd, SplitEnd

MOST_PARAMETERS = 1000
MOST_SORTED = 2**20  # values of a parameter of which quantiles are taken

Array = np.ndarray


def recording_callbacks(folder: Path, training: Training, splits: Sequence[Split]) -> list[Callback]:
    """The callbacks that record a training in its folder, where these splits are evaluated."""
    names, joins_splits = [split.name for split in splits], training.method.joins_splits
    return [
        ParameterLog(folder, training.method),
        ObservationLog(folder, training.evaluator, names, joins_splits=joins_splits),
    ]


class ObservationLog(Callback):
    """Writes what the evaluator has recorded, and the peak memory, after every split.

    Args:
        folder: of the training.
        evaluator: that may record something.
        splits: the names of the splits that are evaluated.
        joins_splits: whether all of them are learned at once.
    """

    def __init__(self, folder: Path, evaluator: Evaluator, splits: Iterable[str], *, joins_splits: bool) -> None:
        self._folder, self._evaluator, self._splits = folder, evaluator, list(splits)
        self._joins_splits = joins_splits
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_split_end(self, event: SplitEnd) -> None:
        self._write(event)

    def on_run_end(self, event: RunEnd) -> None:
        self._write(event)  # again, because a process may have been killed after it saved a checkpoint

    def _write(self, event: Event) -> None:
        observations = observations_of(self._evaluator)
        if observations is not None:
            after = len(self._splits) - 1 if self._joins_splits else event.split_index
            about = Recording(event.method, event.seed, "", self._splits, after)
            write_recording(self._folder, about, observations)
        write_resources(self._folder, peak_memory())


def peak_memory() -> dict[str, int]:
    """The peak memory in bytes: of the process since it began, and of a GPU since the training began; where it is known."""
    memory = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        memory["process_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        pass
    if torch.cuda.is_available():
        memory["cuda_peak"] = torch.cuda.max_memory_allocated()
    return memory


class ParameterLog(Callback):
    """Writes how far parameters that have an anchor moved in every split, and how important they are.

    Args:
        folder: of the training.
        method: whose `anchored_parameters` are measured.
    """

    def __init__(self, folder: Path, method: Method) -> None:
        self._folder, self._method = folder, method
        self._rows: dict[int, Mapping[str, _Moved]] = {}

    def state_dict(self) -> dict[str, Any]:
        """By split and parameter what was measured."""
        return {
            str(split): {name: torch.tensor(one, dtype=torch.float64) for name, one in row.items()}
            for split, row in self._rows.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._rows = {
            int(split): {name: _Moved(*values.tolist()) for name, values in row.items()} for split, row in state.items()
        }

    def on_epoch_end(self, event: EpochEnd) -> None:
        if event.epoch == event.num_epochs - 1:
            self._rows[event.split_index] = _moved(self._method)

    def on_split_end(self, event: SplitEnd) -> None:
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        parameters = _largest(dict(self._method.model.named_parameters()))
        anchored = self._method.anchored_parameters()
        if not anchored:
            return
        now = [anchored[name].importance if name in anchored else None for name in parameters]
        rows = [[self._rows[split].get(name, _Moved()) for name in parameters] for split in sorted(self._rows)]
        table = np.array(rows, np.float64).reshape(len(rows), len(parameters), len(_Moved._fields))
        columns = dict(zip(_Moved._fields, np.moveaxis(table, 2, 0), strict=True))
        write_parameters(
            self._folder,
            RecordedParameters(
                names=list(parameters),
                num_values=np.array([parameter.numel() for parameter in parameters.values()], np.int64),
                splits=np.array(sorted(self._rows), np.int32),
                importance=np.ascontiguousarray(columns["importance"]),
                moved=columns["moved"].astype(np.float32),
                anchor_norm=columns["anchor_norm"].astype(np.float32),
                pull=columns["pull"].astype(np.float32),
                importance_now=np.array([0.0 if values is None else _sum(values) for values in now], np.float64),
                quantiles=np.array([_quantiles(values) for values in now], np.float32),
            ),
        )


class _Moved(NamedTuple):
    """Of one parameter at the end of a split, see `RecordedParameters`."""

    importance: float = 0.0
    moved: float = float("nan")
    anchor_norm: float = float("nan")
    pull: float = float("nan")


@torch.no_grad()
def _moved(method: Method) -> dict[str, _Moved]:
    """How far every parameter with an anchor is from it."""
    parameters = dict(method.model.named_parameters())
    rows = {}
    for name, (importance, anchor) in method.anchored_parameters().items():
        if name in parameters and parameters[name].shape == anchor.shape:
            squares = (parameters[name].detach().to(anchor.device) - anchor).square()
            sums = importance, squares, anchor.square(), importance.to(anchor.device) * squares
            rows[name] = _Moved(*map(_sum, sums))
    return rows


def remove_recording(folder: Path) -> None:
    """Removes what an earlier training has recorded in the folder."""
    for name in RECORDING_FILES:
        (folder / name).unlink(missing_ok=True)


def _largest(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the most values, in their order, so that their number is bounded."""
    by_size = sorted(parameters, key=lambda name: -parameters[name].numel())
    names = set(by_size[:MOST_PARAMETERS])
    return {name: parameter for name, parameter in parameters.items() if name in names}


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _quantiles(values: Tensor | None) -> Array:
    """Of at most `MOST_SORTED` of the values, evenly spaced; zeros for None."""
    if values is None or values.numel() == 0:
        return np.zeros(len(QUANTILES))
    flat = values.detach().flatten()[:: -(-values.numel() // MOST_SORTED)]
    return np.quantile(flat.float().cpu().numpy(), QUANTILES)
