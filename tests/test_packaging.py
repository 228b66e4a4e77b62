"""The sdist and the wheel that is built from it, tried in an environment that has never seen the repository."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist and a wheel, from the files that git tracks."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    (sdist,), (wheel,) = ((folder / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    return sdist, wheel


def test_the_sdist_and_the_wheel_hold_what_they_need(built):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "mas_embed/importance/rules/absolute_products.c"} <= names
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert {
        "mas_embed/py.typed",
        "mas_embed/report/page.html.jinja",
        "mas_embed/facts/__init__.py",
        "mas_embed/recognition/__init__.py",
    } <= packed
    assert not any(name.startswith(("tests", "benchmarks")) for name in packed)


def test_the_wheel_works_in_a_clean_environment(built, tmp_path):
    _, wheel = built
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # The dependencies, several gigabytes, are those of this environment; its editable mas-embed is not among them
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "{name: tiny, data: {name: digits, num_splits: 2}, model: {name: small_conv, width: 2}, loss: TripletMarginLoss, "
        "methods: [finetune, {name: mas, output: projection}], training: {epochs: 1}}"
    )
    code = "import mas_embed; print(mas_embed.__file__); print('facts' in mas_embed.DATASETS)"
    assert run(python, "-c", code, cwd=tmp_path).split() == [str(site / "mas_embed" / "__init__.py"), "True"]
    output = run(tmp_path / "env" / "bin" / "mas-embed", "run", config, "--out", tmp_path / "run", cwd=tmp_path)
    assert "finetune" in output
    assert (tmp_path / "run" / "report.html").exists()
