import errno
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pytorch_metric_learning.losses import TripletMarginLoss
from tiny_experiment import TINY

from mas_embed import CALLBACKS, LOSSES, Callback, read_results
from mas_embed.cli import main
from mas_embed.runtime.signals import Terminated

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    changes = {"seeds": [0], "methods": ["finetune", "mas", "joint"], "model": TINY["model"] | {"is_normalized": False}}
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


@pytest.fixture
def mas_embed(monkeypatch, capsys):
    """Runs the command line in this process, as the installed command does."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mas-embed", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=stopped.value.code or 0, stdout=captured.out, stderr=captured.err)

    return call


def test_the_installed_command(tmp_path):
    command = Path(sys.executable).parent / "mas-embed"
    result = subprocess.run(
        [command, "check", "missing.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "error: cannot read the config missing.yaml: No such file or directory\n"
    assert result.stdout == ""


def test_run_prints_the_table_and_where_things_are(mas_embed, config, tmp_path):
    result = mas_embed("run", config, "--out", tmp_path / "run", "--set", "methods.mas.strength=3")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("final", "forgetting", "backward", "learning", "seconds", "finetune", "mas", "joint"):
        assert text in result.stdout
    for name in ("report.html", "scores.png", "results.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert max(map(len, result.stdout.splitlines()[:6])) <= 80
    again = mas_embed("run", config, "--out", tmp_path / "run", "--set", "methods.mas.strength=3")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    assert "--overwrite" in again.stderr
    resumed = mas_embed("run", config, "--out", tmp_path / "run", "--set", "methods.mas.strength=3", "--resume")
    assert resumed.returncode == 0
    assert resumed.stdout.count("done already") == 3
    (tmp_path / "run" / "report.html").unlink()
    assert mas_embed("report", tmp_path / "run").returncode == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_check_shows_what_will_be_trained_and_writes_nothing(mas_embed, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = mas_embed("check", config)
    assert result.returncode == 0, result.stderr
    for text in (
        "strength: 1.0",
        "0-4",
        "5-9",
        "trunk.0.weight",
        "rule",
        "8 of 8 parameters",
        "3 methods x 1 seeds = 3 runs",
    ):
        assert text in result.stdout
    assert yaml.safe_load(result.stdout.partition("splits   ")[0].partition("\nsplits")[0])["name"] == "tiny"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_check_says_that_the_compiled_code_is_missing(mas_embed, config, monkeypatch, is_there):
    monkeypatch.setattr("mas_embed.cli.has_compiled_products", lambda: is_there)
    assert ("C compiler" in " ".join(mas_embed("check", config).stdout.split())) != is_there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "methods.mas.strenght=3"], "did you mean 'strength'"),
        (["--set", "training.epochs=few"], "training.epochs='few' is not accepted"),
        (["--set", "training.sampler.m=500"], "m=500 images per class"),
        (["--set", "data.num_splits=7"], "num_splits must divide"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_mistake_is_one_sentence_and_exit_code_2(mas_embed, config, tmp_path, command, arguments, message):
    result = mas_embed(command, config, *arguments, *(["--out", tmp_path / "run"] if command == "run" else []))
    assert result.returncode == 2
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_there(mas_embed, tmp_path):
    for arguments in (["run", tmp_path / "no.yaml"], ["check", tmp_path / "no.yaml"], ["report", tmp_path]):
        result = mas_embed(*arguments)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert "Traceback" not in result.stderr


def test_a_run_that_diverges_says_so_without_a_traceback(mas_embed, config, tmp_path):
    result = mas_embed("run", config, "--out", tmp_path / "run", "--set", "training.optimizer={name: SGD, lr: 1e30}")
    assert result.returncode == 1
    of_a_run = (
        r"{} seed 0: training diverged, the loss is nan in split '.*', epoch 1, step 2: lower the learning rate, or the "
        r"strength; the checkpoint before that is kept"
    )
    each = "; ".join(of_a_run.format(method) for method in ("finetune", "mas", "joint"))
    assert re.fullmatch(rf"failed: {each} \(--resume tries what has failed again\)\n", result.stderr), result.stderr


def test_a_run_that_breaks_is_exit_code_1_and_keeps_its_traceback(mas_embed, config, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("mas_embed.experiment.runner.train_sequence", broken)
    result = mas_embed("run", config, "--out", tmp_path / "run")
    assert result.returncode == 1
    log = re.fullmatch(r"failed: OSError: disk full \(traceback in (.*)\)\n", result.stderr).group(1)
    assert Path(log) == tmp_path / "run" / "error.log"
    assert "Traceback" in Path(log).read_text()


def test_an_interrupt_says_how_to_go_on(mas_embed, config, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mas_embed.experiment.runner.train_sequence", interrupted)
    result = mas_embed("run", config, "--out", tmp_path / "run")
    assert result.returncode == 130
    assert "--resume" in result.stderr


def test_an_interrupted_training_goes_on_by_the_command_that_is_shown(mas_embed, config, tmp_path, monkeypatch):
    class Interrupts(Callback):
        num_seen = 0

        def __init__(self, folder):
            pass

        def on_step_end(self, event):
            Interrupts.num_seen += 1
            if Interrupts.num_seen == 5:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(CALLBACKS._components, "interrupts", Interrupts)
    arguments = ["run", config, "--out", tmp_path / "run", "--overwrite", "--set", "callbacks=[interrupts]"]
    result = mas_embed(*arguments, "--set", "methods=[finetune]")
    assert result.returncode == 130
    command = re.fullmatch(r"interrupted; go on with: mas-embed (run .* --resume)\n", result.stderr).group(1)
    assert "--overwrite" not in command
    assert mas_embed(*shlex.split(command)).returncode == 0
    assert read_results(tmp_path / "run").runs[0].num_steps == Interrupts.num_seen > 5  # none was repeated


def test_an_interrupt_elsewhere_and_a_termination(mas_embed, config, tmp_path, monkeypatch):
    def stopped(kind):
        def stop(*args, **kwargs):
            raise kind

        return stop

    monkeypatch.setattr("mas_embed.cli.dry_run", stopped(KeyboardInterrupt))
    result = mas_embed("check", config)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    monkeypatch.setattr("mas_embed.cli.dry_run", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    result = mas_embed("check", config)
    assert (result.returncode, result.stderr) == (143, "terminated\n")
    monkeypatch.setattr("mas_embed.experiment.runner.train_sequence", stopped(Terminated))
    result = mas_embed("run", config, "--out", tmp_path / "run")
    assert result.returncode == 143
    assert result.stderr == f"terminated; go on with: mas-embed run {config} --out {tmp_path / 'run'} --resume\n"


def test_an_interrupt_while_the_program_starts():
    """The imports take seconds; they are replaced here by a module that is interrupted."""
    script = (
        "import sys, types, mas_embed.__main__ as program\n"
        "class Interrupted(types.ModuleType):\n"
        "    def __getattr__(self, name): raise KeyboardInterrupt\n"
        "sys.modules['mas_embed.cli'] = Interrupted('mas_embed.cli')\n"
        "program.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_the_program_in_an_odd_environment(config, tmp_path):
    """A terminal that knows ASCII only, a backend of matplotlib that does not exist, and a reader that goes away early."""
    command = [str(Path(sys.executable).parent / "mas-embed")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense", "OMP_NUM_THREADS": "1"}
    arguments = [
        "run",
        str(config),
        "--out",
        str(tmp_path / "run"),
        "--set",
        "methods=[finetune]",
        "--set",
        "data.name=digits",
        "--set",
        "name=tïny",
    ]
    with subprocess.Popen(
        command + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as run:
        run.stdout.close()
        errors = run.stderr.read()
    assert (run.returncode, errors) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()
    report = subprocess.run(
        [*command, "report", str(tmp_path / "run")], capture_output=True, text=True, env=environment, check=False
    )
    assert (report.returncode, report.stderr) == (0, "")
    assert "t?ny: mAP over" in report.stdout


def test_no_folder_for_a_traceback(mas_embed, config, monkeypatch):
    def unforeseen(*args):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("mas_embed.cli.dry_run", unforeseen)
    monkeypatch.setattr(
        "tempfile.mkdtemp", lambda **options: (_ for _ in ()).throw(FileNotFoundError("no usable folder"))
    )
    result = mas_embed("check", config)
    assert result.returncode == 1
    assert result.stderr == "failed: ZeroDivisionError: by zero (its traceback could not be written)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "CONFIG", "--out", ""], "Invalid value for '--out': it is empty"),
        (["report", "RUN", "--out", " "], "Invalid value for '--out': it is empty"),
        (["run", "CONFIG", "--out", "CONFIG"], "tiny.yaml is a file, not a folder; name another with --out"),
        (["report", "RUN"], "there is no .*results.json; name the directory of a run"),
        (["run", "CONFIG", "--out", "x" * 300], "File name too long"),
        (["check", "FOLDER\n\x1b[31mred"], r"FOLDER\\n\\x1b\[31mred"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "CONFIG", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(mas_embed, config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    named = {"CONFIG": config, "RUN": tmp_path / "run"}
    result = mas_embed(*(named.get(argument, argument) for argument in arguments))
    assert result.returncode == 2
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr


def test_a_full_disk_is_named(mas_embed, config, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    result = mas_embed("run", config, "--out", tmp_path / "run")
    assert result.returncode == 1
    assert re.fullmatch(r"failed: cannot write .*/run/.*: No space left on device\n", result.stderr), result.stderr


def test_what_fails_when_it_is_too_late_fails_in_check(mas_embed, config):
    """Schedulers that cannot step, and losses that know too few classes."""
    epochs = "training.epochs=3"
    for override, message in (
        (
            "training.scheduler={name: OneCycleLR, total_steps: 1, max_lr: .1}",
            "training.scheduler .*Tried to step 2 times",
        ),
        ("training.scheduler={name: CosineAnnealingLR, T_max: 0}", "training.scheduler .* by zero"),
        ("training.scheduler=ReduceLROnPlateau", "training.scheduler: it steps on a measured value"),
        ("training.scheduler={name: ExponentialLR, gamma: -1}", "training.scheduler: the learning rate is -"),
        ("training.scheduler={name: ExponentialLR, gamma: 1e308}", "training.scheduler: the learning rate is inf"),
        ("loss={name: LateLoss}", "loss on the labels of split '5-9' does not work .*: no class 9"),
    ):
        result = mas_embed("check", config, "--set", override, "--set", epochs)
        assert result.returncode == 2
        assert re.fullmatch(f"error: {message}.*\n", result.stderr), result.stderr
    fine = mas_embed(
        "check", config, "--set", "training.scheduler={name: CosineAnnealingLR, T_max: 3}", "--set", epochs
    )
    assert (fine.returncode, fine.stderr) == (0, "")


if "LateLoss" not in LOSSES:  # pytest imports this file a second time, to look for doctests in it

    @LOSSES.register("LateLoss")
    class LateLoss(TripletMarginLoss):
        """A loss that takes no label above 8."""

        def forward(self, embeddings, labels, *args):
            if int(labels.max()) > 8:
                raise IndexError(f"no class {int(labels.max())}")
            return super().forward(embeddings, labels, *args)


def test_list_shows_kinds_components_and_options(mas_embed):
    kinds = mas_embed("list").stdout
    assert "datasets" in kinds and "callbacks" in kinds
    methods = mas_embed("list", "methods").stdout
    assert "mas" in methods and "Memory Aware Synapses" in methods
    options = mas_embed("list", "methods", "mas").stdout
    assert "strength" in options and "1.0" in options and "Aljundi" in options
    assert mas_embed("list", "method", "mas").stdout == options
    for arguments, message in ((["methodes"], "did you mean 'methods'"), (["methods", "maas"], "did you mean 'mas'")):
        result = mas_embed("list", *arguments)
        assert result.returncode == 2 and message in result.stderr


def test_a_module_in_the_working_directory_brings_components(mas_embed, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_components.py").write_text(
        "from mas_embed import METHODS, Method\n\n@METHODS.register('mine')\nclass Mine(Method):\n    pass\n"
    )
    arguments = [config, "--set", "methods=[mine]", "--set", "evaluation.follow_index=false"]
    assert mas_embed("run", *arguments).returncode == 2
    result = mas_embed("run", *arguments, "--import", "cli_components", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "mine" in result.stdout
    for command in (["check", *arguments], ["report", tmp_path / "run"], ["list", "methods", "mine"]):
        result = mas_embed(*command, "--import", "cli_components")
        assert result.returncode == 0 and "mine" in result.stdout, result.stderr
    missing = mas_embed("check", config, "--import", "not_there")
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)
    assert "cannot import 'not_there', given by --import: ModuleNotFoundError" in missing.stderr


def test_the_version_and_the_modules(mas_embed, monkeypatch, capsys):
    version = mas_embed("--version").stdout
    assert re.fullmatch(r"mas-embed \d+\.\d+\.\d+\n", version)
    for module in ("mas_embed", "mas_embed.cli"):
        monkeypatch.setattr(sys, "argv", [module, "--version"])
        capsys.readouterr()
        with pytest.raises(SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is imported already
            runpy.run_module(module, run_name="__main__")
        assert capsys.readouterr().out == version
