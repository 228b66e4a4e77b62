"""Galleries that are read in chunks, as those are that outgrow memory: the same values as in one piece."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import in_two_processes

from mas_embed import UserError, compare_indexes, evaluate_retrieval
from mas_embed.retrieval import find_nearest

DISTANCES = ["cosine", "euclidean", "inner_product"]


@pytest.fixture
def small_chunks(monkeypatch):
    """A chunk holds few items, and nothing is prepared but what is read."""
    monkeypatch.setattr("mas_embed.retrieval.similarity.PREPARED_BYTES", 0)
    monkeypatch.setattr("mas_embed.retrieval.similarity.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("mas_embed.retrieval.compatibility.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("mas_embed.retrieval.metrics.MEBIBYTE", 6000)  # 125 items of 12 dimensions
    monkeypatch.setattr("mas_embed.retrieval.search.BYTES_AT_ONCE", 2000)


def data(*, ties, size=300, dimensions=12):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(size, dimensions)).astype(np.float32)
    if ties:
        rows = np.round(rows[np.arange(size) % 40], 1) + (1 if ties == "far" else 0)
    return rows, np.minimum(generator.geometric(0.1, size=size), 30).astype(np.int32)


def mapped(array, path):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def results(gallery, labels, folder, **options):
    ids = np.arange(len(gallery))
    arrays = [mapped(array, folder / f"{name}.npy") for name, array in (("g", gallery), ("l", labels), ("i", ids))]
    return evaluate_retrieval(
        arrays[0][:40], arrays[1][:40], arrays[0], arrays[1], query_ids=arrays[2][:40], gallery_ids=arrays[2], memory_mib=1,
        ndcg_at=(3,), **options,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["sorted", "counted"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_chunks_change_nothing(distance, ties, share, monkeypatch, tmp_path, request):
    monkeypatch.setattr("mas_embed.retrieval.ranking.DENSE_SHARE", share)
    expected = results(*data(ties=ties), tmp_path, distance=distance)
    request.getfixturevalue("small_chunks")
    found = results(*data(ties=ties), tmp_path, distance=distance, progress=True)
    for name, values in expected.per_query.items():
        np.testing.assert_allclose(found.per_query[name], values, rtol=1e-12, err_msg=name)  # a sum of other padding


@pytest.mark.parametrize("distance", DISTANCES)
def test_comparing_in_chunks_changes_nothing(distance, tmp_path, request):
    old, labels = data(ties=False)
    new = old @ np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0].astype(np.float32) + 0.1 * old**2

    def compared():
        files = [mapped(rows, tmp_path / f"{name}.npy") for name, rows in (("old", old), ("new", new))]
        queries = [rows[:50] for rows in files]
        fit_on = tuple(rows[200:250] for rows in files)
        return compare_indexes(*queries, *files, labels[:50], labels, distance=distance, fit_on=fit_on, k=5)

    expected = compared()
    request.getfixturevalue("small_chunks")
    found = compared()
    assert (found.verdict, found.compensation, found.churn) == (expected.verdict, expected.compensation, expected.churn)
    np.testing.assert_allclose(found.drift, expected.drift, rtol=1e-12)
    for name, scores in expected.compensated.items():
        np.testing.assert_allclose(
            found.compensated[name].per_query["average_precision"], scores.per_query["average_precision"], rtol=1e-12
        )


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_nearest_of_all_chunks(distance, small_chunks):
    rows = torch.from_numpy(data(ties=False)[0])
    scores, positions = find_nearest(rows[:20], rows, 60, distance=distance)
    normalized = torch.nn.functional.normalize(rows.double()) if distance == "cosine" else rows.double()
    exact = -torch.cdist(normalized[:20], normalized) if distance == "euclidean" else normalized[:20] @ normalized.T
    np.testing.assert_array_equal(positions, exact.argsort(descending=True)[:, :60].numpy())
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_zero_row_is_refused_wherever_it_stands(small_chunks):
    rows, labels = data(ties=False)
    rows[-1] = 0
    with pytest.raises(UserError, match="gallery contain an all-zero embedding"):
        evaluate_retrieval(rows[:5], labels[:5], rows, labels)


def evaluate_shards(rank, folder):
    """Unequal shards, of which one lacks some classes."""
    rows, labels = data(ties=True)
    ids = np.arange(len(rows))
    own = slice(None, 200) if rank == 0 else slice(200, None)
    for distance in DISTANCES:
        for options in ({}, {"memory_mib": 1}):
            scores = evaluate_retrieval(
                rows[:50], labels[:50], rows[own], labels[own], query_ids=ids[:50], gallery_ids=ids[own], distance=distance,
                ndcg_at=(3,), is_sharded=True, **options,
            )  # fmt: skip
        torch.save(
            {name: torch.from_numpy(values) for name, values in scores.per_query.items()},
            f"{folder}/{distance}{rank}.pt",
        )


def test_a_gallery_that_is_sharded_over_processes(tmp_path):
    in_two_processes(evaluate_shards, tmp_path)
    rows, labels = data(ties=True)
    ids = np.arange(len(rows))
    for distance in DISTANCES:
        expected = evaluate_retrieval(
            rows[:50], labels[:50], rows, labels, query_ids=ids[:50], gallery_ids=ids, distance=distance, ndcg_at=(3,)
        )
        for rank in range(2):
            found = torch.load(tmp_path / f"{distance}{rank}.pt")
            for name, values in expected.per_query.items():
                np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-12, err_msg=name)


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(UserError, match="is_sharded needs a gallery and labels"):
        evaluate_retrieval([[1.0], [2.0]], [0, 0], is_sharded=True)


SCRIPT = """
import re, resource, sys, numpy as np, torch
from pathlib import Path
from mas_embed import evaluate_retrieval
torch.set_num_threads(1)
rows = np.load(sys.argv[1], mmap_mode="r")
labels = np.arange(len(rows)) % 5_000
evaluate_retrieval(rows[:1000], labels[:1000], rows[:9000], labels[:9000], memory_mib=8)
in_use = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (in_use + 84 * 2**20,) * 2)
print(evaluate_retrieval(rows[:20], labels[:20], rows, labels, memory_mib=8).mean_average_precision)
np.array(rows)  # does not fit
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited otherwise")
def test_a_mapped_gallery_is_never_in_memory_as_a_whole(tmp_path):
    """The file has 98 MiB, and the process may not take 84 MiB more than it has."""
    generator = np.random.default_rng(0)
    array = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float32, shape=(200_000, 128))
    array[:] = generator.random(array.shape, dtype=np.float32) - 0.5
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "rows.npy"], capture_output=True, text=True)
    assert 0 < float(done.stdout) < 1, done.stderr
    assert "MemoryError" in done.stderr
