"""What a run may write into, replace and go on with."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from tiny_experiment import TINY, few_digits, load_from

from mas_embed import DATASETS, RunError, Split, UserError, read_results, run_experiment
from mas_embed.experiment.run_directory import folder_name
from mas_embed.report import REPORT_FILES, write_report
from mas_embed.runtime.output_folder import is_marked, locked

pytestmark = pytest.mark.usefixtures("blank_pictures")

QUICK = {**TINY, "seeds": [0], "methods": ["finetune"], "evaluation": {"follow_index": False}}
OWN_FILES = ("config.yaml", "environment.json", "results.json", *REPORT_FILES, "error.log")


@pytest.fixture
def quick(tmp_path):
    """Loads the quick experiment with changes."""
    return lambda **changes: load_from(tmp_path, QUICK | changes)


@pytest.fixture
def run_folder(quick, tmp_path):
    """A finished run."""
    run_experiment(quick(), tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("name", [*OWN_FILES, "finetune/seed0/log.jsonl", "finetune/seed0/checkpoint.safetensors"])
def test_a_file_of_the_user_is_never_replaced(quick, tmp_path, name, flags):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = contents(tmp_path / "mine")
    with pytest.raises(UserError, match="is there already, and was not written by mas-embed; name another folder"):
        run_experiment(quick(), tmp_path / "mine", **flags)
    assert contents(tmp_path / "mine") == before


def test_a_folder_with_other_files_is_written_into(quick, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    run_experiment(quick(), tmp_path / "mine")
    run_experiment(quick(), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flags", [{"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize(
    "name", ["finetune", "finetune/seed0", "finetune/seed0/log.jsonl", "finetune/seed0/checkpoint.safetensors", "report.html"]
)  # fmt: skip
def test_links_are_not_followed(quick, run_folder, tmp_path, name, flags):
    """Neither written through, as a log, nor into, as a folder of another run."""
    moved = tmp_path / "elsewhere"
    (run_folder / name).rename(moved)
    (run_folder / name).symlink_to(moved)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{name} is a link, where a (file|folder) is to be written; remove it"):
        run_experiment(quick(), run_folder, **flags)
    assert contents(tmp_path) == before


def test_the_run_directory_itself_may_be_a_link(quick, tmp_path):
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")
    run_experiment(quick(), tmp_path / "run")
    assert read_results(tmp_path / "large-disk").methods == ["finetune"]


def test_a_pipe_in_the_place_of_a_log_is_refused(quick, run_folder):
    log = run_folder / "finetune" / "seed0" / "log.jsonl"
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match="is a pipe or device"):
        run_experiment(quick(), run_folder, resume=True)


def test_a_mark_that_names_folders_outside_removes_nothing_there(quick, run_folder, tmp_path):
    outside = tmp_path / "other" / "seed0"
    outside.mkdir(parents=True)
    (outside / "log.jsonl").write_text("of another run")
    mark = run_folder / ".mas-embed.json"
    mark.write_text(json.dumps({"folders": ["../other/seed0", str(outside), "finetune/../../other/seed0", 7]}))
    run_experiment(quick(), run_folder, overwrite=True)
    assert (outside / "log.jsonl").read_text() == "of another run"


def test_a_run_of_an_earlier_version_without_a_mark(quick, run_folder):
    for name in (".mas-embed.json", ".mas-embed.lock"):
        (run_folder / name).unlink()
    with pytest.raises(UserError, match="holds a run already"):
        run_experiment(quick(), run_folder)
    write_report(run_folder)
    run_experiment(quick(), run_folder, resume=True)
    (run_folder / ".mas-embed.json").unlink()
    run_experiment(quick(methods=["frozen"]), run_folder, overwrite=True)
    assert is_marked(run_folder)
    assert not (run_folder / "finetune").exists()


def test_what_a_killed_run_has_left_is_cleared(quick, run_folder):
    for folder in (run_folder, run_folder / "finetune" / "seed0"):
        (folder / ".mas-embed-1234.tmp").write_text("half a fi")
    (run_folder / "environment.json").unlink()
    run_experiment(quick(), run_folder, resume=True)
    assert not list(run_folder.rglob("*.tmp"))
    assert (run_folder / "environment.json").exists()


def test_checkpoints_without_their_config_are_left_alone(quick, run_folder):
    (run_folder / "config.yaml").unlink()
    (run_folder / "results.json").unlink()
    before = contents(run_folder)
    with pytest.raises(UserError, match="holds a run already"):
        run_experiment(quick(), run_folder)
    with pytest.raises(UserError, match="config.yaml is gone, so it is not known what was trained there"):
        run_experiment(quick(), run_folder, resume=True)
    assert contents(run_folder) == before


def test_another_config_is_told_by_the_keys_that_differ(quick, run_folder):
    changes = {
        "training": TINY["training"] | {"epochs": 2, "batch_size": 19},
        "methods": [{"name": "finetune", "label": "x"}],
    }
    with pytest.raises(
        UserError,
        match=r"\(methods.finetune.name: 'finetune' there, nothing here; training.epochs: 1 there, 2 here; training.batch_size: 20 "
        r"there, 19 here; methods.x.name: nothing there, 'finetune' here; methods.x.label: nothing there, 'x' here\); give the old",
    ):
        run_experiment(quick(**changes), run_folder, resume=True)
    (run_folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="holds a run of another config, which this one cannot resume; compare"):
        run_experiment(quick(), run_folder, resume=True)


def test_what_changes_no_result_may_change(quick, run_folder):
    changes = {"num_workers": 1, "checkpoint_every": {"minutes": None, "steps": 7}}
    before = read_results(run_folder)
    assert run_experiment(quick(training=TINY["training"] | changes), run_folder, resume=True) == before
    assert "steps: 7" in (run_folder / "config.yaml").read_text()


def test_a_run_from_before_an_option_existed_has_its_default(quick, run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    del config["training"]["checkpoint_every"], config["data"]["held_out"], config["report"]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert run_experiment(quick(), run_folder, resume=True) == read_results(run_folder)
    del config["training"]["epochs"]  # 1 in this run, which is not the default
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(UserError, match=r"\(training.epochs: 20 there, 1 here\)"):
        run_experiment(quick(), run_folder, resume=True)


def test_another_number_of_threads_is_told(quick, run_folder):
    path = run_folder / "environment.json"
    environment = json.loads(path.read_text())
    assert environment["threads"] == torch.get_num_threads()
    path.write_text(json.dumps(environment | {"threads": 77}))
    with pytest.warns(UserWarning, match="began with 77 threads and goes on with .* may differ in the last digits"):
        run_experiment(quick(), run_folder, resume=True)


def test_resume_starts_where_there_is_nothing_to_resume(quick, tmp_path):
    run_experiment(quick(), tmp_path / "new", resume=True)
    assert read_results(tmp_path / "new").methods == ["finetune"]


def test_a_checkpoint_of_another_method_is_not_taken(quick, tmp_path):
    strong = {"name": "mas", "label": "strong", "strength": 9, "output": "projection"}
    weak = strong | {"label": "weak", "strength": 1}
    run_experiment(quick(methods=[weak, strong]), tmp_path / "run")
    checkpoint = (tmp_path / "run" / "weak" / "seed0" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "run" / "strong" / "seed0" / "checkpoint.safetensors").write_bytes(checkpoint)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(RunError, match=r"of another sequence: its method is {'strength': 1}, not {'strength': 9}"):
        run_experiment(quick(methods=[weak, strong]), tmp_path / "run", resume=True)


def test_data_that_has_changed_is_not_gone_on_with(quick, run_folder, monkeypatch):
    """Not even if the trainings that the old data was for have ended."""

    @functools.wraps(few_digits)
    def fewer_digits(**options):
        first, *others = few_digits(**options)
        return [
            Split(
                first.name, type(first.train)(first.train.inputs[1:], first.train.labels[1:]), first.query, first.query
            ),
            *others,
        ]

    monkeypatch.setitem(DATASETS._components, "few_digits", fewer_digits)
    with pytest.raises(UserError, match="the data of split '0-4' has changed since the run in .* began"):
        run_experiment(quick(), run_folder, resume=True)


def test_two_processes_do_not_write_into_one_folder(quick, run_folder):
    with locked(run_folder), pytest.raises(UserError, match="another process is writing into .*; wait for its end"):
        run_experiment(quick(), run_folder, resume=True)
    script = textwrap.dedent(f"""
        from pathlib import Path
        from mas_embed.runtime.output_folder import locked
        with locked(Path({str(run_folder)!r})):
            print("locked", flush=True)
            input()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is writing"):
            run_experiment(quick(), run_folder, overwrite=True)
        other.kill()
    run_experiment(quick(), run_folder, resume=True)


LABELS = ["results.json", "report.html", "config.yaml", "error.log", "漢" * 100, "a b", "_", "x."]


def test_every_label_has_a_folder_of_its_own(quick, tmp_path):
    names = [folder_name(label) for label in LABELS]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) < 200 for name in names)
    methods = [{"name": "finetune", "label": label} for label in LABELS]
    run_experiment(quick(methods=methods), tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
    assert read_results(tmp_path / "run").methods == LABELS
    resumed = run_experiment(quick(methods=methods), tmp_path / "run", resume=True)
    assert len(resumed.runs) == len(LABELS)
    run_experiment(quick(), tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["finetune"]


def test_a_report_that_fails_loses_no_results(quick, tmp_path, monkeypatch):
    def fails(figure):
        raise ValueError("no such font")

    monkeypatch.setattr("mas_embed.report.page.png_of", fails)
    with pytest.raises(
        RunError, match=r"its scores are in .*results.json, but the report cannot be written: .*no such font"
    ):
        run_experiment(quick(), tmp_path / "run")
    assert read_results(tmp_path / "run").methods == ["finetune"]
    monkeypatch.undo()
    write_report(tmp_path / "run")


@pytest.mark.parametrize("name", ["report.html", "scores.png"])
def test_a_report_of_several_runs_replaces_no_file_of_the_user(run_folder, tmp_path, name):
    mine = tmp_path / "both"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there already, and was not written by mas-embed"):
        write_report(run_folder, out=mine)
    assert contents(mine) == {mine / name: b"mine"}
    (mine / name).unlink()
    write_report(run_folder, out=mine)
    write_report(run_folder, out=mine)  # its own report it replaces
    assert is_marked(mine)


def test_a_report_of_odd_names(run_folder):
    """Bytes of a folder name that are no UTF-8, and characters that a terminal would obey."""
    results = json.loads((run_folder / "results.json").read_text())
    results["splits"] = ["caf\udce9", "$\\frac$\x1b[31m"]
    (run_folder / "results.json").write_text(json.dumps(results))
    write_report(run_folder)
    assert "caf\\udce9" in (run_folder / "report.html").read_text(encoding="utf-8")


def test_a_report_shows_what_is_there_where_the_config_is_damaged(run_folder):
    (run_folder / "config.yaml").write_bytes(b"a: [")
    (run_folder / "report.html").unlink(missing_ok=True)
    write_report(run_folder)
    assert "Every split after every split" in (run_folder / "report.html").read_text()
    (run_folder / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="config.yaml: not a text file"):
        write_report(run_folder)
