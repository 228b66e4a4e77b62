"""Runs that are killed at random moments, again and again, and resumed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted import EVERYTHING
from tiny_experiment import found_by, load_from

from mas_embed import run_experiment
from mas_embed.experiment import runner


def start_here(config, folder):
    """The run in a copy of this process, which has everything imported and leaves out what a run tries first."""

    def work():
        runner.dry_run = lambda *args: None
        os.fsync = lambda descriptor: None
        run_experiment(config, folder, resume=True)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process.pid, process.join


def start_command(config, folder):
    """The run by the command line."""
    path = folder.parent / "given.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "mas_embed", "run", path, "--out", folder, "--import", "interrupted", "--resume"]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    process = subprocess.Popen(command, cwd=tests, env=environment, stdout=subprocess.DEVNULL)
    return process.pid, process.wait


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize(
    ("start", "num_kills", "num_workers"),
    [
        (start_here, 2, 0),
        pytest.param(start_here, 20, 2, marks=pytest.mark.slow),
        pytest.param(start_command, 20, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again(tmp_path, start, num_kills, num_workers):
    config = load_from(tmp_path, EVERYTHING | {"training": EVERYTHING["training"] | {"num_workers": num_workers}})
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    start(config, tmp_path / "whole")[1]()
    seconds = time.monotonic() - begin
    whole, num_steps = found_by(tmp_path / "whole"), (tmp_path / "whole" / "count").stat().st_size

    generator = random.Random(0)
    count, num_killed, before = tmp_path / "killed" / "count", 0, 0
    while num_killed < num_kills:
        pid, wait = start(config, tmp_path / "killed")
        while not (count.exists() and count.stat().st_size > before) and is_running(pid):
            time.sleep(0.01)  # until it trains
        time.sleep(generator.uniform(0, seconds / num_kills / 2))
        before = count.stat().st_size
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
            num_killed += 1
        wait()
        if (tmp_path / "killed" / "report.html").exists():
            break
    assert num_killed >= num_kills / 2
    start(config, tmp_path / "killed")[1]()
    assert found_by(tmp_path / "killed") == whole
    assert count.stat().st_size - num_steps <= num_killed * (
        3 + 2
    )  # the steps between checkpoints, and those accumulated


def is_running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
