"""A task in the process that runs it, which is made like the one that has sent it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mas_embed.data import DATASETS, TRANSFORMS
from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.evaluation import EVALUATORS
from mas_embed.experiment.stopping import stoppable
from mas_embed.losses import LOSSES, MINERS
from mas_embed.methods import METHODS
from mas_embed.models import MODELS
from mas_embed.runtime.atomic_files import is_of_the_disk
from mas_embed.runtime.shown_warnings import warnings_as_sentences
from mas_embed.training import CALLBACKS, OPTIMIZERS, SAMPLERS, SCHEDULERS

_REGISTRIES = {
    registry.kind: registry
    for registry in (
        DATASETS, TRANSFORMS, MODELS, LOSSES, MINERS, METHODS, EVALUATORS, SAMPLERS, OPTIMIZERS, SCHEDULERS, CALLBACKS,
    )
}  # fmt: skip
_SECONDS_BETWEEN_LOOKS = 0.5
_one_at_a_time = threading.Lock()  # the random generators and the number of threads are those of the process


@dataclass(frozen=True)
class Failure:
    """Why a task has failed.

    Attributes:
        sentence: that a user reads.
        traceback: of an exception that nobody has foreseen; None for a `UserError` or `RunError`.
        stops_others: whether the other tasks would fail, too, as when the disk is full.
    """

    sentence: str
    traceback: str | None = None
    stops_others: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that an exception is."""
        if isinstance(error, (UserError, RunError)):
            return cls(str(error), stops_others=is_of_the_disk(error))
        text = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {reason_of(error)}", text, is_of_the_disk(error))


@dataclass(frozen=True)
class Outcome:
    """How a task has ended.

    Attributes:
        task: its position among the tasks.
        value: that its function has returned; None if it failed.
        failure: None if it did not.
        seconds: wall time.
        warnings: the texts of its `UserWarning`s.
    """

    task: int
    value: Any
    failure: Failure | None
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Surroundings:
    """What a task in another process needs to find as it is in this one.

    Attributes:
        threads: of one task.
        modules: that register components, imported first.
        components: those that other packages, scripts and notebooks have registered here, as cloudpickle writes them.
        process: the number of this process.
        folder: the working directory.
        path: where modules are imported from.
        stopping: the folder of `stored_before_the_end`.
    """

    threads: int
    modules: tuple[str, ...] = ()
    components: bytes = field(default=b"", repr=False)
    process: int = field(default_factory=os.getpid)
    folder: str = field(default_factory=os.getcwd)
    path: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))
    stopping: str = ""


def surroundings_of_jobs(threads: int, modules: Sequence[str] = ()) -> Surroundings:
    """What the tasks in other processes need of this one.

    Raises:
        UserError: a component that was registered here cannot be sent to another process.
    """
    import cloudpickle

    found = [
        (kind, name, component, registry.provided_by(name))
        for kind, registry in _REGISTRIES.items()
        for name, component in registry.added().items()
    ]
    try:
        return Surroundings(threads, tuple(modules), cloudpickle.dumps(found))
    except Exception as error:
        raise UserError(
            f"a component that was registered here cannot be sent to other processes ({reason_of(error)}); register it in a "
            "module, and name the module with --import, or in Python with imports=[...]"
        ) from error


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Lets PyTorch, and FAISS with it, use a number of threads in the body of the `with` statement."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_task(
    surroundings: Surroundings, function: Callable[..., Any], task: int, arguments: tuple[Any, ...]
) -> Outcome:
    """Calls the function of a task where the task was sent to; an exception is a part of what it returns."""
    start, value, failure = time.perf_counter(), None, None
    texts: list[str] = []
    with _one_at_a_time, warnings_as_sentences(texts.append):
        try:
            with entered(surroundings):
                start = time.perf_counter()
                value = function(*arguments)
        except Exception as error:
            failure = Failure.of(error)
    return Outcome(task, value, failure, time.perf_counter() - start, tuple(texts))


@contextmanager
def entered(surroundings: Surroundings) -> Iterator[None]:
    """Makes a process such as the one that the surroundings are of, for the body of the `with` statement."""
    with ExitStack() as stack:
        stack.enter_context(num_threads(surroundings.threads))
        if os.getppid() == surroundings.process and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent passes it on
            _end_with_parent(surroundings.process)
            stack.enter_context(stoppable(surroundings.stopping))
        if os.getpid() != surroundings.process:
            sys.path.extend(one for one in surroundings.path if one not in sys.path)
            if Path(surroundings.folder).is_dir():
                stack.enter_context(chdir(surroundings.folder))
            _register_components(surroundings)
        yield


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent has died."""
    if not any(thread.name == _watch.__name__ for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=[parent], name=_watch.__name__, daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)  # nobody waits for the task, and a run that is resumed must not meet it


def _register_components(surroundings: Surroundings) -> None:
    import cloudpickle

    try:
        for module in surroundings.modules:
            importlib.import_module(module)
        components = cloudpickle.loads(surroundings.components) if surroundings.components else []
    except Exception as error:
        raise RunError(
            f"a worker cannot import the components of the config ({type(error).__name__}: {reason_of(error)}); install their "
            "module where the worker runs"
        ) from error
    for kind, name, component, provides in components:
        if name not in _REGISTRIES[kind]:
            _REGISTRIES[kind].register(name, provides=provides)(component)
