"""Every block of the README runs, and its figures are those that its commands print."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mas_embed import load_config
from mas_embed.cli import main
from mas_embed.config.yaml_file import _Loader
from mas_embed.experiment.runner import run_experiment
from mas_embed.report import old_index_table, summary_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for found, text in BLOCKS if found == language]


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job, as `make demo` runs it."""
    out = tmp_path_factory.mktemp("main") / "run"
    return run_experiment(load_config(ROOT / "configs" / "digits.yaml"), out), out


def mean(results, method, measure):
    runs = [run for run in results["runs"] if run["method"] == method]
    assert len(runs) == 3
    return np.mean([run["measures"]["mean_average_precision"][measure] for run in runs])


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d*\.\d+", text)]


def test_every_language_is_run_below():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml", "text"}


def test_mas_forgets_at_most_half_and_ends_a_tenth_higher(main_job):
    results, _ = main_job
    assert mean(results, "mas", "forgetting") <= 0.5 * mean(results, "finetune", "forgetting")
    assert mean(results, "mas", "final_average") >= mean(results, "finetune", "final_average") + 0.10
    assert (
        mean(results, "joint", "final_average")
        > mean(results, "mas", "final_average")
        > mean(results, "frozen", "final_average")
    )


def test_the_main_table_is_what_its_command_prints(main_job):
    """Means to 0.08: another processor adds up in another order, and training carries that on (one seed more than the mean)."""
    printed = summary_table(main_job[0]).to_markdown().splitlines()
    start = README.index("<!-- main table -->")
    stated = [line for line in README[start:].splitlines() if line.startswith("|")][: len(printed)]
    for stated_row, printed_row in zip(stated, printed, strict=True):
        stated_cells, printed_cells = stated_row.split("|")[1:-2], printed_row.split("|")[1:-2]  # without the seconds
        assert stated_cells[0].strip() == printed_cells[0].strip()
        assert numbers("".join(stated_cells)) == pytest.approx(numbers("".join(printed_cells)), abs=0.08)


def test_the_index_table_is_what_its_command_prints(main_job):
    """Its scores to 0.15: what differs from processor to processor differs more here, over single updates."""
    printed = old_index_table(main_job[0]).to_markdown().splitlines()
    start = README.index("<!-- index table -->")
    stated = [line for line in README[start:].splitlines() if line.startswith("|")][: len(printed)]
    for stated_row, printed_row in zip(stated, printed, strict=True):
        stated_cells, printed_cells = stated_row.split("|")[1:-2], printed_row.split("|")[1:-2]  # without the verdicts
        assert stated_cells[0].strip() == printed_cells[0].strip()
        assert numbers("".join(stated_cells)) == pytest.approx(numbers("".join(printed_cells)), abs=0.15)


def test_the_python_blocks_run_in_order(main_job, capsys, monkeypatch, tmp_path):
    results, out = main_job
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(out)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)  # the README is ours
    # The ten lines are the main job's: method mas, seed 0
    run = next(run for run in results["runs"] if (run["method"], run["seed"]) == ("mas", 0))
    assert (
        namespace["result"].scores["mean_average_precision"].scores.tolist() == run["scores"]["mean_average_precision"]
    )
    assert namespace["result"].seconds.keys() == run["seconds"].keys()
    stated = numbers(next(text for text in blocks("text") if text.startswith("final average")))
    assert stated == pytest.approx(numbers(capsys.readouterr().out.splitlines()[0]), abs=0.15)


def test_the_commands_run(monkeypatch, tmp_path, capsys):
    """Each of them; the long ones with one epoch and one seed."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "".join(blocks("bash")).splitlines():
        command, *arguments = line.split("#")[0].split()
        if command == "make":
            assert arguments[0] in targets
        elif command == "mas-embed":
            short = ["--set", "training.epochs=1", "--set", "seeds=[0]"] if arguments[0] in ("run", "check") else []
            if "configs/compare_digits.yaml" in arguments or "configs/beyond_mas.yaml" in arguments:
                short += ["--set", "methods=[{name: mas, embed: unnormalized, select: {strength: [1, 3], seeds: [9]}}]"]
            monkeypatch.setattr(sys, "argv", [command, *arguments, *short])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, capsys.readouterr().err
        elif command == "python":
            compile(Path(arguments[0]).read_text(), arguments[0], "exec")
        else:
            assert command in ("git", "cd"), line


def test_the_yaml_blocks_are_configs(tmp_path):
    base = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    for block in blocks("yaml"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(base | yaml.load(block, _Loader)))
        load_config(tmp_path / "config.yaml")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
