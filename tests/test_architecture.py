"""Who may import whom, and what importing the package costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mas_embed

PACKAGE = Path(mas_embed.__file__).parent

BASE = {"errors", "registry", "runtime"}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "runtime": {"errors"},
    "importance": BASE,
    "losses": BASE,
    "models": BASE,
    "data": BASE,
    "retrieval": BASE,
    "methods": BASE | {"importance", "losses"},
    "evaluation": BASE | {"retrieval", "data"},
    "training": BASE | {"methods", "data", "evaluation"},
    "facts": BASE | {"data", "models", "losses", "evaluation", "retrieval"},
    "recognition": BASE | {"data", "models", "losses", "methods", "evaluation", "retrieval"},
    "config": BASE | {"data", "models", "losses", "methods", "evaluation", "training"},
    "experiment": BASE | {"config", "data", "models", "losses", "methods", "evaluation", "training", "report"},
    "report": BASE | {"evaluation"},
    "testing": BASE | {"importance", "methods", "data", "training"},
    "cli": BASE | {"config", "experiment", "report", "importance", "data", "models", "losses", "methods", "evaluation", "retrieval", "training"},
    "__main__": {"cli", "runtime"},
}  # fmt: skip


# Imported inside a function, when it is called: `SequenceResult.plot` and `.report`
WHEN_CALLED = {"training/result.py": {"report"}}


def imports_of(path, *, nodes=ast.walk):
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mas_embed"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mas_embed."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "integrations":
        assert set(imports_of(path)) <= {*mas_embed.__all__, "integrations"}  # public names only
    elif part != "__init__":
        when_called = WHEN_CALLED.get(path.relative_to(PACKAGE).as_posix(), set())
        assert set(imports_of(path)) <= MAY_IMPORT[part] | {part} | when_called
        assert not when_called & set(imports_of(path, nodes=ast.iter_child_nodes))


def test_the_root_holds_only_what_the_layout_names():
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {
        "__init__.py", "__main__.py", "cli.py", "errors.py", "py.typed", "registry.py",
        "config", "data", "evaluation", "experiment", "facts", "importance", "integrations", "losses", "methods", "models", "recognition", "report",
        "retrieval", "runtime", "testing", "training",
    }  # fmt: skip


def test_no_room_is_imported_by_what_it_imports():
    def reached(room):
        below = MAY_IMPORT[room]
        return below.union(*map(reached, below)) if below else set()

    for room in MAY_IMPORT:
        assert room not in reached(room)


def test_facts_are_a_plug_in():
    """Nothing else knows of them: neither by import nor by name."""
    named = re.compile(r"\b(facts?|fact_\w+|Fact[A-Z]\w*)\b")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "facts":
            assert not named.search(path.read_text()), path


def test_recognition_is_a_plug_in():
    """Nothing else imports it or names its components."""
    named = re.compile(r"mas_embed\.recognition|multi_head|MultiHead|\bRecognition[A-Z]|classes_per_split")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "recognition":
            assert not named.search(path.read_text()), path


def test_faiss_is_imported_in_one_module():
    assert [path.name for path in PACKAGE.rglob("*.py") if "import faiss" in path.read_text()] == ["search.py"]


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = [
        "faiss",
        "matplotlib",
        "lightning",
        "transformers",
        "yaml",
        "sklearn",
        "pytorch_metric_learning",
        "accelerate",
        "torch",
    ]
    code = f"import sys, mas_embed; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there_and_documented():
    for name in mas_embed.__all__:
        assert getattr(mas_embed, name).__doc__, name
    assert set(mas_embed.__all__) <= set(dir(mas_embed))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mas_embed.nothing  # noqa: B018


def test_the_names_that_others_build_on():
    assert set(mas_embed.__all__) >= {
        "EWC", "Importance", "LwF", "MAS", "OnlineImportance", "Recipe", "RetrievalEvaluator", "RetrievalIndex", "RetrievalScores",
        "SI", "ScoreMatrix", "compare_indexes", "estimate_importance", "estimate_local_importance", "evaluate_retrieval",
        "explain_coverage", "load_config", "run_experiment", "train_sequence",
    }  # fmt: skip


def test_signatures_are_a_contract():
    assert list(inspect.signature(mas_embed.train_sequence).parameters) == [
        "model", "splits", "method", "loss", "miner", "recipe", "evaluator", "evaluate_on", "importance_data", "callbacks",
        "checkpoint", "resume", "checkpoint_every", "accelerator", "seed",
    ]  # fmt: skip
    assert list(inspect.signature(mas_embed.Recipe).parameters) == [
        "epochs", "batch_size", "optimizer", "scheduler", "sampler", "num_workers", "clip_norm", "accumulate",
        "precision", "compile",
    ]  # fmt: skip


def test_files_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
