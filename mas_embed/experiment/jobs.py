"""Tasks side by side, in processes of this machine or of a cluster, through `joblib`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.experiment.worker import Outcome, Surroundings, run_task
from mas_embed.runtime.checks import as_whole_number, check_choice
from mas_embed.runtime.libraries import require_library

ALL_CORES = -1  # as in joblib
THREADS_VARIABLE = "OMP_NUM_THREADS"
BACKENDS = ("dask", "ray")  # of joblib, for clusters

_SECONDS_TO_CONNECT = 10


@dataclass(frozen=True)
class Task:
    """A call in another process.

    Attributes:
        name: for people to read.
        function: of a module, so that other processes find it.
        arguments: of the call; plain, as all of them are sent.
        end: is called in this process with the outcome.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    end: Callable[[Outcome], None]


def check_jobs(jobs: int, num_tasks: int) -> int:
    """How many tasks run side by side: at most as many as there are.

    Args:
        jobs: as asked for; -1 for the number of cores, or of all cores of a cluster.
        num_tasks: how many there are.

    Raises:
        UserError: it is 0, or more than there are cores; the cluster of joblib's backend has no workers.
    """
    if jobs != ALL_CORES:
        jobs = as_whole_number("jobs (-1: one for each core)", jobs, 1)
    if jobs == 1:
        return jobs
    import joblib

    is_here = runs_on_this_machine()
    with _cluster_errors_explained():
        cores = joblib.cpu_count() if is_here else joblib.effective_n_jobs(ALL_CORES)
    if is_here and jobs > cores:
        raise UserError(
            f"jobs must be at most {cores}, the number of cores of this machine, got {jobs}: more trainings at once would "
            "only slow each other down; pass -1 for one job for each core"
        )
    return min(cores if jobs == ALL_CORES else jobs, num_tasks)


@contextmanager
def cluster(backend: str | None, address: str | None) -> Iterator[None]:
    """Lets `run_experiment` train on a cluster in the body of the `with` statement.

    Args:
        backend: one of `BACKENDS`; None for this machine.
        address: of the cluster: "tcp://host:8786" of the scheduler of Dask; of Ray, None for the cluster of this machine.

    Raises:
        UserError: the library is not installed, or there is no cluster at the address.
    """
    if backend is None:
        if address is not None:
            raise UserError("--address is that of a cluster; say of which kind with --backend dask or --backend ray")
        yield
        return
    check_choice("--backend", backend, BACKENDS)
    import joblib

    if backend == "ray":
        ray = require_library("ray", extra="ray")
        with _cluster_errors_explained():
            ray.init(address=address or "auto")
            require_library("ray.util.joblib", extra="ray").register_ray()
        with joblib.parallel_config("ray"):
            yield
        return
    distributed = require_library("dask.distributed", extra="dask")
    if not address:
        raise UserError("--backend dask needs the address of a scheduler, as in --address tcp://localhost:8786")
    with _cluster_errors_explained():
        client = distributed.Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    with client, joblib.parallel_config("dask", client=client):
        yield


def runs_on_this_machine() -> bool:
    """Whether joblib's current backend is its own pool of processes, not one of a cluster or another."""
    from joblib.parallel import get_active_backend

    with _cluster_errors_explained():
        backend, _ = get_active_backend()
    return bool(backend.supports_inner_max_num_threads)


def threads_of_a_job(jobs: int) -> int:
    """The threads that each of several jobs may use: `OMP_NUM_THREADS` if it is set, else an equal share of those of PyTorch.

    On a cluster, whose machines may have other cores than this one, it is 1 if the variable is not set.
    """
    if os.environ.get(THREADS_VARIABLE, "").isdecimal():
        return max(1, int(os.environ[THREADS_VARIABLE]))
    return max(1, torch.get_num_threads() // jobs) if runs_on_this_machine() else 1


@contextmanager
def workers_ended() -> Iterator[None]:
    """Ends joblib's processes on this machine after the body of the `with` statement: they would wait, with their data."""
    try:
        yield
    finally:
        if runs_on_this_machine():
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor(reuse=True).shutdown(wait=True)


def run_tasks(tasks: Sequence[Task], *, jobs: int, surroundings: Surroundings) -> Generator[tuple[Task, Outcome]]:
    """Runs several tasks at once in other processes; yields each as it ends.

    The processes are those of joblib's current backend: its own on this machine, unless `joblib.parallel_config` names
    another. Tasks that are in one process, such as a worker of a cluster with several threads, run one after the other.
    When the iterator is closed, or an exception is raised meanwhile, the processes on this machine end.

    Args:
        tasks: started in this order.
        jobs: how many run at once.
        surroundings: from `surroundings_of_jobs`.

    Raises:
        RunError: a process has died, or the cluster is gone.
    """
    import joblib

    if not tasks:
        return
    calls = [
        joblib.delayed(run_task)(surroundings, task.function, index, task.arguments) for index, task in enumerate(tasks)
    ]
    running = dict(enumerate(tasks[:jobs]))
    with ExitStack() as stack:
        if runs_on_this_machine():
            stack.enter_context(joblib.parallel_config("loky", inner_max_num_threads=surroundings.threads))
        with _dead_workers_explained(running):
            outcomes = _in_parallel(calls, min(jobs, len(calls)))
        for num_done in range(1, len(calls) + 1):
            with _dead_workers_explained(running):
                outcome = next(outcomes)
            yield tasks[outcome.task], outcome
            running.pop(outcome.task, None)
            running.update(list(enumerate(tasks))[jobs + num_done - 1 : jobs + num_done])


def _in_parallel(calls: list[Any], jobs: int) -> Iterator[Outcome]:
    """The outcomes as they come; from a backend that cannot do that, such as the one of Ray, all of them in the end."""
    import joblib

    options = {"n_jobs": jobs, "pre_dispatch": jobs, "batch_size": 1, "max_nbytes": None}
    try:
        parallel = joblib.Parallel(return_as="generator_unordered", **options)
    except ValueError:
        return iter(joblib.Parallel(return_as="list", **options)(calls))
    outcomes: Iterator[Outcome] = parallel(calls)
    return outcomes


@contextmanager
def _dead_workers_explained(running: Mapping[int, Task]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # not of a task: those are a part of its outcome
        names = ", ".join(task.name for task in running.values())
        raise RunError(
            f"a worker process has ended, perhaps because memory ran out, while {names} were trained "
            f"({type(error).__name__}: {reason_of(error)}); pass --resume to go on, and fewer jobs to need less memory"
        ) from error


@contextmanager
def _cluster_errors_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"the workers of joblib's backend cannot be used: {reason_of(error)}") from error
