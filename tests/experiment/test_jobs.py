"""Trainings side by side give what trainings one after the other give."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import joblib
import pytest
import torch
import yaml
from small import Recorder
from tiny_experiment import TINY, load_from

from mas_embed import ProgressBar, RunError, UserError, read_results, run_experiment
from mas_embed.experiment import ExperimentCallback, jobs
from mas_embed.experiment.jobs import check_jobs, cluster, threads_of_a_job
from mas_embed.experiment.worker import num_threads
from mas_embed.training.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.usefixtures("blank_pictures"),
    pytest.mark.skipif(joblib.cpu_count() < 2, reason="one core"),
]

SELECT = {"name": "mas", "output": "projection", "select": {"strength": [1, 100], "seeds": [7, 8], "num_splits": 1}}


def without_seconds(results):
    content = results.model_dump(mode="json")
    for one in [*content["runs"], *(one for found in content["selections"].values() for one in found["candidates"])]:
        del one["seconds"]
    return content


class Listener(ExperimentCallback):
    def __init__(self):
        self.events = []

    def on_epoch_end(self, event):
        self.events.append(("epoch", event.method, event.seed, event.split_index, event.num_epochs))

    def on_run_recorded(self, record):
        self.events.append(("run", record.method, record.seed))

    def on_run_skipped(self, run):
        self.events.append(("skip", run.method.title, run.seed))

    def on_run_failed(self, run, reason):
        self.events.append(("failed", run.method.title, run.seed))

    def on_candidate_end(self, method, candidate):
        self.events.append(("candidate", method, candidate.options["strength"]))


def test_side_by_side_is_one_after_the_other(tmp_path):
    """With a selection, a method that fails, and components that no installed package has registered; then resumed."""
    fixed = tmp_path / "fixed"
    methods = [SELECT, {"name": "breaks", "until": str(fixed), "how": "error"}, "finetune"]
    config = load_from(tmp_path, TINY | {"seeds": [0], "methods": methods})
    listener, before = Listener(), torch.get_num_threads()
    with pytest.raises(
        RunError, match=r"^breaks seed 0: ZeroDivisionError: by zero \(traceback in .*error.log\).*--resume"
    ):
        run_experiment(config, tmp_path / "two", jobs=2, callbacks=[listener])
    assert "ZeroDivisionError" in (tmp_path / "two" / "error.log").read_text()
    assert torch.get_num_threads() == before
    assert ("failed", "breaks", 0) in listener.events
    assert {event for event in listener.events if event[0] != "epoch"} == {
        ("failed", "breaks", 0), ("candidate", "mas", 1), ("candidate", "mas", 100), ("run", "mas", 0), ("run", "finetune", 0),
    }  # fmt: skip
    assert [event for event in listener.events if event[:2] == ("epoch", "finetune")] == [
        ("epoch", "finetune", 0, 0, 1),
        ("epoch", "finetune", 0, 1, 1),
    ]
    assert (tmp_path / "two" / "report.html").exists()
    fixed.touch()
    resumed = run_experiment(config, tmp_path / "two", resume=True)
    expected = run_experiment(config, tmp_path / "one")
    assert without_seconds(resumed) == without_seconds(expected)
    assert without_seconds(read_results(tmp_path / "two")) == without_seconds(expected)
    threads = json.loads((tmp_path / "two" / "environment.json").read_text())["threads"]
    assert threads == (1 if "OMP_NUM_THREADS" not in os.environ else int(os.environ["OMP_NUM_THREADS"]))


def test_one_failing_run_is_not_the_end_of_the_others_in_one_process_either(tmp_path):
    methods = [{"name": "breaks", "until": str(tmp_path / "fixed")}, "finetune"]
    config = load_from(tmp_path, TINY | {"seeds": [0, 1], "methods": methods})
    listener = Listener()
    with pytest.raises(
        RunError, match="^breaks seed 0: it broke; breaks seed 1: it broke .the others are stored; --resume"
    ):
        run_experiment(config, tmp_path / "run", callbacks=[listener])
    assert [(run.method, run.seed) for run in read_results(tmp_path / "run").runs] == [("finetune", 0), ("finetune", 1)]
    (tmp_path / "fixed").touch()
    results = run_experiment(config, tmp_path / "run", resume=True, callbacks=[listener])
    assert [(run.method, run.seed) for run in results.runs] == [
        (method, seed) for seed in (0, 1) for method in ("breaks", "finetune")
    ]


def test_a_worker_that_dies_is_named(tmp_path):
    methods = [
        {"name": "breaks", "until": str(tmp_path / "fixed"), "how": "killed"},
        {"name": "finetune", "label": "plain"},
    ]
    config = load_from(
        tmp_path, TINY | {"seeds": [0], "methods": methods, "training": TINY["training"] | {"epochs": 20}}
    )
    with pytest.raises(
        RunError, match="a worker process has ended, .* while breaks seed 0.* were trained .*SIGKILL.*--resume"
    ):
        run_experiment(config, tmp_path / "run", jobs=2)


def test_dask_spreads_the_same_trainings(tmp_path):
    """Its two threads are in this process, where trainings must not disturb each other's random numbers."""
    distributed = pytest.importorskip("dask.distributed")
    config = load_from(tmp_path, TINY | {"methods": ["finetune", "joint"]})
    with num_threads(1):  # as many as a task has
        expected = run_experiment(config, tmp_path / "one")
    with (
        warnings.catch_warnings(action="ignore"),  # of Dask's own servers
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as workers,
        distributed.Client(workers) as client,
    ):
        with joblib.parallel_config("dask", client=client):
            inside = run_experiment(config, tmp_path / "two", jobs=2)
        with cluster("dask", workers.scheduler_address):
            resumed = run_experiment(config, tmp_path / "two", jobs=-1, resume=True)
    assert without_seconds(inside) == without_seconds(resumed) == without_seconds(expected)


@pytest.mark.slow
def test_dask_in_other_processes(tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    config = load_from(tmp_path, TINY | {"seeds": [0], "methods": ["finetune", SELECT]})
    with num_threads(1):  # as many as a task has
        expected = run_experiment(config, tmp_path / "one")
    with (
        warnings.catch_warnings(action="ignore"),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as workers,
        cluster("dask", workers.scheduler_address),
    ):
        spread = run_experiment(config, tmp_path / "two", jobs=2)
    assert without_seconds(spread) == without_seconds(expected)


def children_of(process):
    found = subprocess.run(["ps", "--ppid", str(process), "-o", "pid="], capture_output=True, text=True, check=False)
    return found.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_worker_and_is_resumed(tmp_path, stop, code):
    changes = {"data": {"name": "digits", "num_splits": 5}, "methods": ["finetune", "joint"], "seeds": [0]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(TINY | changes | {"training": {"epochs": 300}}))
    command = [sys.executable, "-m", "mas_embed", "run", str(tmp_path / "long.yaml"), "--out", str(tmp_path / "run")]
    with subprocess.Popen([*command, "--jobs", "2"], stderr=subprocess.PIPE, text=True) as run:
        folders = [tmp_path / "run" / name / "seed0" for name in ("finetune", "joint")]
        while not all((folder / "log.jsonl").exists() for folder in folders):
            assert run.poll() is None
            time.sleep(0.1)
        workers = children_of(run.pid)
        run.send_signal(stop)
        assert run.wait(timeout=60) == code
        if stop != signal.SIGKILL:  # each training has finished its step and stored it
            assert "--resume" in run.stderr.read()
            for folder in folders:
                assert read_checkpoint(folder / "checkpoint.safetensors")[0]["within_split"]
    assert workers
    deadline = time.monotonic() + 10
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [0, -2, 1.5, True, "2"])
def test_a_number_of_jobs_that_is_none(number):
    with pytest.raises(UserError, match="jobs .-1: one for each core. must be a whole number >= 1, got"):
        check_jobs(number, 4)


def test_the_number_of_jobs(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 4)
    assert [check_jobs(number, 12) for number in (1, 3, 4, -1)] == [1, 3, 4, 4]
    assert [check_jobs(number, 2) for number in (1, 3, -1)] == [1, 2, 2]
    with pytest.raises(UserError, match="jobs must be at most 4, the number of cores of this machine, got 5"):
        check_jobs(5, 12)


def test_threads_are_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_of_a_job(number) for number in (1, 2, 3, 16)] == [8, 4, 2, 1]
    with joblib.parallel_config("threading"):  # stands for a cluster, of which this machine knows no cores
        assert threads_of_a_job(2) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_a_job(2) == 3


def test_callbacks_that_are_objects_stay_in_this_process(tmp_path):
    config = load_from(tmp_path, TINY)
    for callback in (Recorder(), ProgressBar()):
        with pytest.raises(
            UserError, match=f"the callback {type(callback).__name__} cannot be informed; name it in the config"
        ):
            run_experiment(config, tmp_path / "run", jobs=2, callbacks=[callback])
    assert not (tmp_path / "run").exists()


def test_clusters_that_are_not_there(monkeypatch):
    for arguments, message in (
        ((None, "tcp://localhost:1"), "--address is that of a cluster; say of which kind"),
        (("dsk", "tcp://localhost:1"), "--backend must be 'dask' or 'ray', got 'dsk'"),
        (("dask", None), "--backend dask needs the address of a scheduler"),
    ):
        with pytest.raises(UserError, match=message), cluster(*arguments):
            pass
    monkeypatch.setattr(jobs, "_SECONDS_TO_CONNECT", 0.2)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(UserError, match="the workers of joblib's backend cannot be used: Timed out"),
        cluster("dask", "tcp://localhost:1"),
    ):
        pass
