"""Who may import whom, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mas_embed

PACKAGE = Path(mas_embed.__file__).parent

# What every module may import: data structures and helpers without knowledge of the domain
BASE = {"errors", "files", "fingerprint", "forward", "registry", "seeding"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "fingerprint": set(),
    "forward": {"errors"},
    "registry": {"errors"},
    "seeding": set(),
    "importance": BASE,
    "losses": BASE,
    "models": BASE,
    "data": BASE,
    "retrieval": BASE,
    "forgetting": BASE,
    "methods": BASE | {"importance"},
    "training": BASE | {"methods", "losses", "models", "data", "retrieval", "forgetting"},
    "report": BASE,
    "run_directory": BASE,
    "options": BASE,
    "selection": {"errors"},
    "yaml_file": BASE,
    "config": BASE
    | {"options", "data", "losses", "methods", "models", "retrieval", "selection", "training", "yaml_file"},
    "experiment": BASE
    | {
        "config",
        "data",
        "forgetting",
        "losses",
        "methods",
        "models",
        "options",
        "report",
        "run_directory",
        "selection",
        "training",
    },
    "testing": BASE | {"methods"},
    "cli": BASE | {"config", "experiment", "importance", "report"},
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mas_embed"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mas_embed."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part != "__init__":
        assert set(imports_of(path)) <= MAY_IMPORT[part] | {part}


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
        "Importance", "MAS", "RetrievalScores", "ScoreMatrix", "estimate_importance", "evaluate_retrieval", "explain_coverage",
        "load_config", "run_experiment", "train_sequence",
    }  # fmt: skip


def test_functions_and_files_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path
