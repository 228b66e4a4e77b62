"""Mutated inputs of every kind: a command ends well, or with one sentence, and writes into its run directory only."""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from facts.test_fact_list import write_list
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small import Recorder, Stopped

from mas_embed import DATASETS, Part, RetrievalIndex, Split, UserError, load_config, run_experiment
from mas_embed.cli import LONGEST_SENTENCE, main
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.training import SplitEnd

few = pytest.mark.parametrize(
    "num_examples", [pytest.param(1, id="few"), pytest.param(10, id="many", marks=pytest.mark.slow)]
)


def few_points(*, num_splits: int = 2, held_out: str = "test", seed: int = 0):
    """Two classes of four random pictures in each split."""
    generator = torch.Generator().manual_seed(seed)

    def part(index, offset):
        labels = torch.tensor([2 * index, 2 * index + 1]).repeat_interleave(4)
        ids = torch.arange(8) + 100 * index + offset
        return Part(torch.randn(8, 1, 8, 8, generator=generator), labels, ids)

    held = [part(index, 10) for index in range(num_splits)]
    return [Split(f"s{index}", part(index, 0), held[index], held[index]) for index in range(num_splits)]


if "few_points" not in DATASETS:
    DATASETS.register("few_points")(few_points)

CONFIG = {
    "name": "hostile",
    "seeds": [0],
    "data": {"name": "few_points", "num_splits": 2},
    "model": {"name": "small_conv", "embedding_size": 4, "width": 2},
    "loss": {"name": "TripletMarginLoss", "margin": 0.05},
    "methods": [{"name": "mas", "label": "m", "strength": 10, "output": "projection"}],
    "subsets": {"old": {"split": "s0", "labels": [0]}},
    "training": {
        "epochs": 1,
        "batch_size": 4,
        "optimizer": {"name": "Adam", "lr": 0.01},
        "scheduler": {"name": "StepLR", "step_size": 1},
        "sampler": {"name": "MPerClassSampler", "m": 2},
    },
    "evaluation": {"name": "retrieval", "recall_at": [1], "primary_metric": "mean_average_precision"},
    "callbacks": [],
}
FACT_CONFIG = {
    "name": "hostile_facts",
    "model": {"name": "small_fact_conv", "width": 2, "hidden": 8},
    "loss": "facts",
    "methods": ["finetune"],
    "training": {"epochs": 1, "batch_size": 8},
    "evaluation": {"name": "facts"},
}

ODD_TEXTS = [
    "", " ", "a\nb", "\x1b[31m", "\ud800", "\0", r"$\frac$", "漢" * 100, "x" * 5000, "..", "/", "-", "_", "[red]", "{x}", "%s",
    "nan", "1e3", "null", "results.json", "\u202e", "\ufeff", "'", '"', "mas", "train", "s0",
]  # fmt: skip
ODD_NUMBERS = [-1, 0, 1, 2, 1.5, -0.5, 1e308, 5e-324, float("inf"), float("nan"), 10**20, 2**63, 2**64, 10**400]
COMPONENTS = [
    {"name": "mas"},
    {"name": "SGD", "lr": 1.0},
    {"name": 3},
    {"nmae": "mas"},
    {"name": "mas", "options": [1]},
]
plain = st.sampled_from([None, True, False, *ODD_NUMBERS, *ODD_TEXTS])
odd_values = st.one_of(
    plain,
    st.sampled_from([[], {}, [[]], [{}], *COMPONENTS]),
    st.lists(plain, max_size=3),
    st.dictionaries(st.sampled_from([*ODD_TEXTS, "name", "options", "label"]), plain, max_size=2),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)


def for_all(*strategies, num_examples):
    """A decorator that calls a function with that many examples, the same ones every time."""

    def decorate(holds):
        checks = list(HealthCheck)
        kept = (Phase.explicit, Phase.generate, Phase.shrink)
        profile = settings(
            max_examples=num_examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks, phases=kept
        )  # fmt: skip
        profile(given(*strategies)(holds))()

    return decorate


def places_of(value, path=()):
    """The path of keys and positions of every value inside a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places_of(inner, (*path, key))


@st.composite
def mutated(draw, value):
    """The value with one to three entries of it replaced, deleted, moved or repeated under another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(places_of(value))
        if not places:
            break
        *parents, key = draw(st.sampled_from(places))
        container = value
        for parent in parents:
            container = container[parent]
        kind = draw(st.sampled_from(["replace", "delete", "add", "swap"]))
        if kind == "delete":
            del container[key]
            continue
        new = draw(odd_values)
        if kind == "swap":  # another value of the same file
            new = value
            for parent in draw(st.sampled_from(places)):
                new = new[parent]
        new = copy.deepcopy(new)
        if kind == "add" and isinstance(container, list):
            container.insert(key, new)
        elif kind == "add":
            container[draw(st.sampled_from([*ODD_TEXTS, "name", "options", "label", "select", "importance"]))] = new
        else:
            container[key] = new
    return value


@st.composite
def damaged(draw, content):
    """The bytes with some of them flipped, left out, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "delete", "repeat", "insert"]))
        end = start + draw(st.integers(1, 60))
        if kind == "flip" and content:
            content[start] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[start:]
        elif kind == "delete":
            del content[start:end]
        elif kind == "repeat":
            content[start:start] = content[start:end]
        else:
            content[start:start] = draw(st.one_of(st.binary(max_size=8), st.sampled_from(ODD_TEXTS).map(as_bytes)))
    return bytes(content)


def as_bytes(text):
    return text.encode(errors="surrogatepass")


def contents(folder):
    """Every file in a folder and what it holds; for links, where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[path] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def call(*arguments):
    """Runs the command line in this process; returns its exit code, what it printed, and the warnings of libraries."""
    out, err = io.StringIO(), io.StringIO()
    argv, path = sys.argv, list(sys.path)
    sys.argv = ["mas-embed", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            with pytest.raises(SystemExit) as stopped:
                main()
    finally:
        sys.argv, sys.path[:] = argv, path
    return SimpleNamespace(
        code=stopped.value.code or 0,
        out=out.getvalue(),
        err=err.getvalue(),
        warned=[str(one.message) for one in warned],
    )


def is_safe(text):
    """Whether a text has no control characters, line separators, lone surrogates or changes of direction."""
    return not any(
        unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") or 0x202A <= ord(one) <= 0x202E for one in text
    )


def check_sentence(text):
    assert len(text) < LONGEST_SENTENCE + 100 and is_safe(text), ascii(text)


def check_ends_well(result):
    """A command has succeeded, or said in one sentence why not."""
    assert result.code in (0, 1, 2), result
    assert "Traceback" not in result.err
    assert "traceback" not in result.err, result.err
    lines = result.err.splitlines()
    for line in lines:
        check_sentence(line)
    errors = [line for line in lines if not line.startswith("warning: ")]
    assert len(errors) == (result.code != 0), result
    assert not result.warned, result.warned


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty working directory."""
    folder = tmp_path_factory.mktemp("hostile")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def finished(workplace):
    """A finished run of two methods and two seeds, as the files in its directory."""
    (workplace / "two.yaml").write_text(
        yaml.safe_dump(CONFIG | {"seeds": [0, 1], "methods": [*CONFIG["methods"], "joint"]})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
        run_experiment(load_config(workplace / "two.yaml"), workplace / "finished")
    (workplace / "two.yaml").unlink()
    return workplace / "finished"


@pytest.fixture(scope="module")
def killed(workplace):
    """A run that was stopped after the first of two splits, and the results that it has when it is resumed."""
    (workplace / "killed.yaml").write_text(yaml.safe_dump(CONFIG))
    config = load_config(workplace / "killed.yaml")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
        run_experiment(config, workplace / "whole")
        stop = Recorder(stop_at=lambda event: isinstance(event, SplitEnd))
        run_experiment(config, workplace / "killed", callbacks=[stop])
    (
        workplace / "killed" / "m" / "seed0" / "checkpoint-previous.safetensors"
    ).unlink()  # which would take the other's place
    return SimpleNamespace(
        folder=workplace / "killed", config=workplace / "killed.yaml", scores=scores_in(workplace / "whole")
    )


def scores_in(folder):
    """All results of a run but its times."""
    results = json.loads((folder / "results.json").read_text())
    return [{key: value for key, value in run.items() if key != "seconds"} for run in results["runs"]]


@few
def test_configs(workplace, num_examples):
    text = yaml.safe_dump(CONFIG, sort_keys=False).encode()
    path = workplace / "config.yaml"

    @for_all(
        st.one_of(mutated(CONFIG).map(lambda c: yaml.safe_dump(c).encode()), damaged(text)),
        num_examples=60 * num_examples,
    )
    def holds(content):
        path.write_bytes(content)
        before = contents(workplace)
        check_ends_well(call("check", path))
        assert contents(workplace) == before

    @for_all(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(as_bytes)), num_examples=30 * num_examples)
    def any_file(content):
        path.write_bytes(content)
        check_ends_well(call("check", path))


KEYS = sorted(
    {".".join(map(str, place)) for place in places_of(CONFIG)} | {"methods.m.strength", "methods.m", "methods.m.select"}
)
VALUES = [
    "",
    "[",
    "{a: 1",
    "-1",
    ".nan",
    "1e999",
    "'\\ud800'",
    '"\\ud800"',
    "&a [*a]",
    "!!python/none",
    "9" * 400,
    "null",
    "\x1b",
    "[1, [2]]",
]
override = st.one_of(
    st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), st.sampled_from(VALUES)),
    st.builds(lambda key, value: f"{key}={json.dumps(value)}", st.sampled_from(KEYS), odd_values),
    st.text(max_size=20),
)


@few
def test_overrides(workplace, num_examples):
    path = workplace / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))

    @for_all(st.lists(override, min_size=1, max_size=2), num_examples=40 * num_examples)
    def holds(overrides):
        check_ends_well(call("check", path, *[word for one in overrides for word in ("--set", one)]))


FACTS = [("cat", "", ""), ("dog", "on", "")]


@few
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_lists_of_facts(workplace, suffix, num_examples):
    folder = workplace / "list"
    write_list(folder, suffix=suffix, facts=FACTS)
    data = {"name": "fact_list", "path": f"list/list.{suffix}", "word_vectors": "list/vectors.txt"}
    options = {"num_splits": 1, "image_size": 28}
    (workplace / "facts.yaml").write_text(yaml.safe_dump(FACT_CONFIG | {"data": data | options}))
    content = (folder / f"list.{suffix}").read_bytes()
    lines = [json.loads(line) for line in content.splitlines()] if suffix == "jsonl" else []
    rows = [line.split(",") for line in content.decode().splitlines()]
    changed = mutated(rows).map(
        lambda rows: "\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    )
    if suffix == "jsonl":
        changed = mutated(lines).map(lambda lines: "\n".join(map(json.dumps, lines)))

    @for_all(st.one_of(changed.map(as_bytes), damaged(content)), num_examples=20 * num_examples)
    def holds(content):
        (folder / f"list.{suffix}").write_bytes(content)
        before = contents(workplace)
        check_ends_well(call("check", "facts.yaml"))
        assert contents(workplace) == before

    shutil.rmtree(folder)


@few
@pytest.mark.parametrize("is_drawn", [False, True])
def test_results(finished, workplace, monkeypatch, is_drawn, num_examples):
    if not is_drawn:
        monkeypatch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
    content = (finished / "results.json").read_bytes()
    results = json.loads(content)

    @for_all(
        st.one_of(mutated(results).map(lambda one: json.dumps(one).encode()), damaged(content)),
        num_examples=(3 if is_drawn else 40) * num_examples,
    )
    def holds(content):
        (finished / "results.json").write_bytes(content)
        before = outside(workplace, finished)
        check_ends_well(call("report", finished))
        assert outside(workplace, finished) == before

    (finished / "results.json").write_bytes(content)


def outside(workplace, folder):
    """What lies beside a run directory."""
    return {path: content for path, content in contents(workplace).items() if not path.is_relative_to(folder)}


@pytest.fixture
def resume(killed, workplace, blank_pictures):
    """Resumes a copy of the killed run, with some of its files replaced; returns what the command has said, and the folder."""

    def call_resume(files, flag="--resume"):
        folder = workplace / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(killed.folder, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = outside(workplace, folder)
        result = call("run", killed.config, "--out", folder, flag)
        assert outside(workplace, folder) == before
        check_ends_well(result)
        return result, folder

    return call_resume


CHECKPOINT = "m/seed0/checkpoint.safetensors"


@few
def test_checkpoints(killed, resume, workplace, num_examples):
    original = (killed.folder / CHECKPOINT).read_bytes()
    tensors, description = read_tensors(killed.folder / CHECKPOINT)

    result, folder = resume({})
    assert result.code == 0 and scores_in(folder) == killed.scores

    @for_all(damaged(original), num_examples=10 * num_examples)
    def bytes_changed(content):
        result, folder = resume({CHECKPOINT: content})
        assert result.code or scores_in(folder) == killed.scores

    @for_all(mutated(description), num_examples=10 * num_examples)
    def description_changed(changed):
        path = workplace.parent / "changed.safetensors"
        write_tensors(path, tensors, changed)
        resume({CHECKPOINT: path.read_bytes()})
        path.unlink()


@few
@pytest.mark.parametrize("flag", ["--resume", "--overwrite", "report"])
def test_files_of_a_run_directory(killed, finished, resume, workplace, flag, num_examples):
    mark = json.loads((killed.folder / ".mas-embed.json").read_text())
    config = (killed.folder / "config.yaml").read_bytes()
    of_paths = st.sampled_from(
        ["../finished", "../finished/m/seed0", "/", ".", "m/../../finished/m/seed0", "m\n/seed0"]
    )
    marks = st.one_of(
        mutated(mark).map(lambda one: json.dumps(one).encode()),
        damaged(json.dumps(mark).encode()),
        st.lists(of_paths).map(lambda paths: json.dumps({**mark, "folders": paths}).encode()),
    )
    configs = st.one_of(damaged(config), mutated(yaml.safe_load(config)).map(lambda one: yaml.safe_dump(one).encode()))

    @for_all(
        st.one_of(st.tuples(marks, st.just(config)), st.tuples(st.just(json.dumps(mark).encode()), configs)),
        num_examples=5 * num_examples,
    )
    def holds(files):
        files = dict(zip((".mas-embed.json", "config.yaml"), files, strict=True))
        if flag != "report":
            resume(files, flag)
            return
        folder = workplace / "reported"
        shutil.copytree(finished, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        before = outside(workplace, folder)
        check_ends_well(call("report", folder))
        assert outside(workplace, folder) == before
        shutil.rmtree(folder)


@few
@pytest.mark.parametrize("memory_map", [False, True])
def test_index_folders(tmp_path, memory_map, num_examples):
    rows = torch.eye(6, 4) + 0.1
    index = RetrievalIndex.build(rows, range(6), fingerprint="a model")
    index.save(tmp_path / "index")
    found = index.search(rows, 3, fingerprint="a model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    tensors, description = read_tensors(tmp_path / "index" / "items.safetensors")
    damaged_file = st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name])))

    def load(name, content):
        """What the index finds, None if it is refused."""
        shutil.rmtree(tmp_path / "index")
        (tmp_path / "index").mkdir()
        for file, original in (files | {name: content}).items():
            (tmp_path / "index" / file).write_bytes(original)
        try:
            loaded = RetrievalIndex.load(tmp_path / "index", memory_map=memory_map)
        except UserError as error:
            check_sentence(str(error))
            return None
        return loaded.search(rows, 3, allow_other_model=True)

    assert load(*next(iter(files.items()))) is not None

    @for_all(damaged_file, num_examples=100 * num_examples)
    def bytes_changed(file):
        loaded = load(*file)
        assert loaded is None or all((a == b).all() for a, b in zip(loaded, found, strict=True))

    @for_all(mutated(description), num_examples=60 * num_examples)
    def description_changed(changed):
        write_tensors(tmp_path / "changed", tensors, changed)
        load("items.safetensors", (tmp_path / "changed").read_bytes())


# What examples of the tests above, and tries by hand, have found


@pytest.mark.parametrize("path", [("measures", "mean_average_precision", "final_average"), ("pooled", "mean_average_precision"),
                                  ("scores", "mean_average_precision", 0, 0), ("seconds", "training"), ("num_bytes",)])  # fmt: skip
@pytest.mark.parametrize("value", [1e308, 10**400], ids=["float", "integer"])
def test_numbers_that_overflow(finished, path, value):
    content = (finished / "results.json").read_bytes()
    results = json.loads(content)
    *parents, key = path
    for run in results["runs"]:
        for parent in parents:
            run = run[parent]
        run[key] = value
    (finished / "results.json").write_text(json.dumps(results))
    result = call("report", finished)
    (finished / "results.json").write_bytes(content)
    check_ends_well(result)


@pytest.mark.parametrize(("key", "value"), [("plan", {"data": 3}), ("details", [{"index_update": "x"}])])
def test_descriptions_of_checkpoints(killed, resume, workplace, key, value):
    tensors, description = read_tensors(killed.folder / CHECKPOINT)
    progress = description["progress"]
    progress[key] = progress[key] | value if isinstance(value, dict) else value
    write_tensors(workplace.parent / "changed.safetensors", tensors, description)
    resume({CHECKPOINT: (workplace.parent / "changed.safetensors").read_bytes()})


@pytest.mark.parametrize("kind", ["\x1b[31m", "x" * 5000])
def test_what_an_index_folder_is_said_to_hold(tmp_path, kind):
    write_tensors(tmp_path / "items.safetensors", {}, {"kind": kind})
    with pytest.raises(UserError) as error:
        RetrievalIndex.load(tmp_path)
    check_sentence(str(error.value))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_folder_in_the_place_of_a_temporary_file(killed, workplace, monkeypatch, flag):
    monkeypatch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
    folder = workplace / "with_folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(killed.folder, folder)
    (folder / ".mas-embed-x.tmp").mkdir()
    check_ends_well(call("run", killed.config, "--out", folder, flag))
