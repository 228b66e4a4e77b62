import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mas_embed import UserError
from mas_embed.retrieval.index import RetrievalIndex
from mas_embed.retrieval.search import import_faiss
from mas_embed.runtime.atomic_files import read_tensors, write_tensors
from mas_embed.runtime.fingerprint import fingerprint_of

FACTORIES = ["Flat", "IVF4,Flat", "HNSW8", "IVF4,PQ2x4", "PCA4,IVF4,SQ8"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GALLERY, QUERIES = random(200, 8), random(12, 8, seed=1)
IDS, LABELS = 2**40 + torch.arange(200) * 3, torch.arange(200) % 7 - 1


def build(factory="Flat", gallery=GALLERY, **options):
    options = {"ids": IDS[: len(gallery)], "fingerprint": "one"} | options
    return RetrievalIndex.build(gallery, LABELS[: len(gallery)], factory=factory, **options)


def search(index, queries=QUERIES, k=5):
    return index.search(queries, k, fingerprint="one")


def assert_same(one, other):
    for array, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_flat_finds_the_nearest_by_full_sort(distance):
    scores = {
        "cosine": nn.functional.normalize(QUERIES) @ nn.functional.normalize(GALLERY).T,
        "euclidean": -(torch.cdist(QUERIES, GALLERY) ** 2),
        "inner_product": QUERIES @ GALLERY.T,
    }[distance]
    best = scores.topk(5)
    found = search(build(distance=distance))
    np.testing.assert_allclose(found.scores, best.values, rtol=1e-4)
    np.testing.assert_array_equal(found.ids, IDS[best.indices])
    np.testing.assert_array_equal(found.labels, LABELS[best.indices])
    assert found.is_found.all()
    assert found.ids.dtype == found.labels.dtype == np.int64


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.filterwarnings("error")
def test_saved_and_loaded_is_the_same_index(factory, memory_map, tmp_path):
    index = build(factory, distance="cosine")
    index.save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", memory_map=memory_map)
    assert repr(loaded) == repr(index)
    assert len(loaded) == 200
    assert_same(search(loaded), search(index))


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_mapped_index_is_not_in_memory_and_does_not_grow(factory, tmp_path):
    build(factory).save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index", memory_map=True)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    with pytest.raises(UserError, match="mapped from a file cannot grow; load it with memory_map=False"):
        loaded.add(GALLERY, LABELS)
    loaded.save(tmp_path / "copy")
    assert_same(search(RetrievalIndex.load(tmp_path / "copy")), search(loaded))


def test_saving_again_replaces_the_index_and_a_failed_save_does_not(tmp_path, monkeypatch):
    build().save(tmp_path / "index")
    more = build(gallery=GALLERY[:50])
    with monkeypatch.context() as patched:
        patched.setattr("mas_embed.retrieval.index_folder.write_tensors", fail)
        with pytest.raises(OSError, match="disk full"):
            more.save(tmp_path / "index")
    assert len(RetrievalIndex.load(tmp_path / "index")) == 200
    more.save(tmp_path / "index")
    assert len(RetrievalIndex.load(tmp_path / "index")) == 50
    assert len(list((tmp_path / "index").iterdir())) == 2


def fail(*arguments):
    raise OSError("disk full")


def test_adding_equals_building_at_once():
    index = build(gallery=GALLERY[:120])
    index.add(GALLERY[120:], LABELS[120:], IDS[120:])
    assert_same(search(index), search(build()))


def test_ids_default_to_positions():
    index = RetrievalIndex.build(GALLERY[:3], [0, 1, 2])
    index.add(GALLERY[3:5], [3, 4])
    assert index.ids.tolist() == [0, 1, 2, 3, 4]


def test_a_failed_add_does_not_change_the_index(monkeypatch):
    monkeypatch.setattr("mas_embed.retrieval.index.ROWS_AT_ONCE", 2)
    index, bad = build(), GALLERY.clone()
    expected = search(index)
    bad[5] = 0
    with pytest.raises(UserError, match="all-zero"):
        index.add(bad, LABELS)
    assert_same(search(index), expected)
    assert len(index) == 200


def test_blocks_change_nothing(monkeypatch):
    whole = search(build())
    monkeypatch.setattr("mas_embed.retrieval.index.ROWS_AT_ONCE", 5)
    assert_same(search(build()), whole)


def test_a_mapped_array_can_be_indexed(tmp_path):
    np.save(tmp_path / "rows.npy", GALLERY.numpy())
    assert_same(search(build(gallery=np.load(tmp_path / "rows.npy", mmap_mode="r"))), search(build()))


class Compiled(nn.Module):
    """Has the parameter names of a model that `torch.compile` returned."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_queries_of_another_model_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    index = RetrievalIndex.build(GALLERY, LABELS, fingerprint=model)
    assert index.fingerprint == fingerprint_of(model)
    expected = index.search(QUERIES, 3, fingerprint=fingerprint_of(model))
    assert_same(index.search(QUERIES, 3, fingerprint=Compiled(model)), expected)
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(
        UserError, match="queries are from model .* and the index is from model .*; embed both with one"
    ):
        index.search(QUERIES, 3, fingerprint=model)
    with pytest.raises(UserError, match="not known which model the queries are from"):
        index.search(QUERIES, 3)
    assert_same(index.search(QUERIES, 3, fingerprint=model, allow_other_model=True), expected)
    unknown = RetrievalIndex.build(GALLERY, LABELS)
    with pytest.raises(UserError, match="not known which model the index is from"):
        unknown.search(QUERIES, 3, fingerprint=model)
    assert_same(unknown.search(QUERIES, 3, allow_other_model=True), expected)


def test_missing_neighbours_are_padded():
    """Four distant groups in one list each; a query for 8 items searches one list of 5 items."""
    centres = torch.eye(4).repeat_interleave(5, dim=0)
    index = RetrievalIndex.build(
        centres + 0.01 * random(20, 4), torch.arange(20) // 5 - 1, factory="IVF4,Flat", fingerprint="one"
    )
    found = index.search(torch.eye(4), 8, fingerprint="one")
    np.testing.assert_array_equal(found.is_found.sum(1), [5] * 4)
    np.testing.assert_array_equal(found.labels[found.is_found].reshape(4, 5), np.arange(4)[:, None].repeat(5, 1) - 1)
    assert (found.ids[~found.is_found] == -1).all() and np.isneginf(found.scores[~found.is_found]).all()
    index.set_search_parameters({"nprobe": 4})
    assert index.search(torch.eye(4), 8, fingerprint="one").is_found.all()


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_recall_against_exact_search_by_sets(distance):
    index = build("IVF4,Flat", distance=distance)
    flat, found = search(build(distance=distance), k=6), search(index, k=6)
    expected = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(flat.ids.tolist(), found.ids.tolist(), strict=True)])
    assert index.recall_against_exact(QUERIES, GALLERY, 6) == pytest.approx(expected)
    assert expected < 1
    index.set_search_parameters({"nprobe": 4})
    assert index.recall_against_exact(QUERIES, GALLERY, 6) == 1


def test_search_parameters_are_saved(tmp_path):
    index = build("PCA4,IVF8,Flat")
    index.set_search_parameters({"nprobe": 8})
    index.save(tmp_path / "index")
    assert_same(search(RetrievalIndex.load(tmp_path / "index")), search(index))


def test_training_on_a_sample_follows_the_seed():
    indexes = [build("IVF8,Flat", training_size=40, seed=seed) for seed in (0, 0, 1)]
    found = [search(index, k=50).ids for index in indexes]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosine_does_not_depend_on_the_scale(scale):
    np.testing.assert_array_equal(search(build(gallery=GALLERY * scale), QUERIES * scale).ids, search(build()).ids)


def test_duplicates_are_all_found_if_k_is_the_size_of_the_index():
    index = RetrievalIndex.build(torch.ones(6, 2), torch.arange(6), fingerprint="one")
    found = index.search(torch.ones(1, 2), 6, fingerprint="one")
    assert sorted(found.ids[0]) == list(range(6))


@pytest.mark.parametrize(
    ("factory", "num_items", "message"),
    [
        ("IVF4,Flat", 3, "an index 'IVF4,Flat' needs at least 4 embeddings to train, got 3"),
        ("IVF4,PQ2", 199, "needs at least 256 embeddings to train, got 199"),
        ("PQ2x4", 15, "needs at least 16 embeddings"),
        ("PCA8,IVF4,Flat", 7, "needs at least 8 embeddings"),
        ("IVF64,Flat,RFlat", 60, "needs at least 64 embeddings"),
        ("PQ3", 200, "FAISS cannot make an index 'PQ3' for cosine of 8 dimensions: .*multiple of the number"),
        ("Nonsense", 200, "cannot make an index 'Nonsense'.*: could not parse index string Nonsense"),
        ("IDMap,Flat", 200, "cannot add to an index 'IDMap,Flat': add does not make sense"),
    ],
)
def test_errors_of_faiss_are_one_sentence(factory, num_items, message):
    with pytest.raises(UserError, match=message):
        build(factory, gallery=GALLERY[:num_items])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gallery": torch.full((2, 8), torch.nan)}, "embeddings contain NaN"),
        ({"gallery": torch.zeros(2, 8)}, "all-zero embedding, which has no cosine"),
        ({"gallery": torch.full((2, 8), 1e19), "distance": "euclidean"}, "squared length exceeds the range of float32"),
        ({"gallery": torch.zeros(0, 8)}, "embeddings must hold at least one embedding"),
        ({"gallery": GALLERY[:4], "ids": [1]}, "4 embeddings but 1 ids"),
        ({"distance": "manhattan"}, "distance must be one of cosine, euclidean, inner_product, got 'manhattan'"),
        ({"factory": "IVF4,Flat", "training_size": 0}, "training_size must be a whole number >= 1, got 0"),
    ],
)
def test_bad_items_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (QUERIES, 0, "k must lie between 1 and the index's size, 200, got 0"),
        (QUERIES, 201, "k must lie between 1 and the index's size, 200, got 201"),
        (QUERIES[:, :4], 1, "queries have 4 dimensions and the index 8; embed both with one model"),
        (torch.full((1, 8), torch.inf), 1, "queries contain NaN or infinite"),
        (torch.zeros(1, 8), 1, "queries contain an all-zero embedding"),
    ],
)
def test_bad_queries_are_one_sentence(queries, k, message):
    with pytest.raises(UserError, match=message):
        search(build(), queries, k)


def test_bad_parameters_are_one_sentence():
    with pytest.raises(UserError, match="cannot set 'nprobe' of an index 'Flat'"):
        build().set_search_parameters({"nprobe": 3})
    with pytest.raises(UserError, match="the gallery must hold the index's 200 items, got 3"):
        build().recall_against_exact(QUERIES, GALLERY[:3], 1)


def test_damaged_folders_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="the folder .* does not exist; make it first, to save"):
        build().save(tmp_path / "no" / "index")
    with pytest.raises(UserError, match="cannot read .*items.safetensors"):
        RetrievalIndex.load(tmp_path)
    write_tensors(tmp_path / "items.safetensors", {}, {"kind": "importance"})
    with pytest.raises(UserError, match=r"holds 'importance', not an index"):
        RetrievalIndex.load(tmp_path)
    build().save(tmp_path)
    without_checksums(tmp_path)
    (vectors,) = tmp_path.glob("*.faiss")
    whole = vectors.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nonsense"):
        vectors.write_bytes(damaged)
        for memory_map in (False, True):
            with pytest.raises(UserError, match="cannot read .* as a FAISS index"):
                RetrievalIndex.load(tmp_path, memory_map=memory_map)
    import_faiss().write_index(import_faiss().IndexFlatIP(8), str(vectors))
    with pytest.raises(UserError, match="has 0 vectors but 200 ids"):
        RetrievalIndex.load(tmp_path)
    vectors.unlink()
    with pytest.raises(UserError, match="the vectors of the index are missing"):
        RetrievalIndex.load(tmp_path)


def changed(folder, *, tensors=None, **changes):
    """Writes the items file again, with other tensors and with entries of its description changed, or removed by None."""
    path = folder / "items.safetensors"
    old_tensors, description = read_tensors(path)
    new = {name: value for name, value in (description | changes).items() if value is not None}
    write_tensors(path, old_tensors if tensors is None else tensors, new)


def without_checksums(folder):
    """Makes the folder one that an earlier version saved."""
    with safe_open(folder / "items.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["mas_embed"])
        tensors = {name: file.get_tensor(name) for name in ("ids", "labels")}
    del description["checksums"]
    save_file(tensors, folder / "items.safetensors", {"mas_embed": json.dumps(description)})


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_folder_of_an_earlier_version_without_checksums_loads(memory_map, tmp_path):
    build().save(tmp_path)
    without_checksums(tmp_path)
    assert_same(search(RetrievalIndex.load(tmp_path, memory_map=memory_map)), search(build()))
    with pytest.raises(UserError, match="has no checksums, as an earlier version saved it; load and save the index"):
        RetrievalIndex.verify(tmp_path)


@pytest.mark.parametrize(
    "vectors",
    ["/etc/passwd", "../vectors-0123456789ab.faiss", "a/vectors-0123456789ab.faiss", "x.faiss", "", 3, None, {}],
)
def test_a_name_that_save_does_not_write_is_never_opened(vectors, tmp_path):
    build().save(tmp_path)
    changed(tmp_path, vectors=vectors)
    for read in (RetrievalIndex.load, RetrievalIndex.verify):
        with pytest.raises(UserError, match="'vectors' in its description is missing or not valid"):
            read(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    build().save(tmp_path / "index")
    (vectors,) = (tmp_path / "index").glob("*.faiss")
    vectors.rename(tmp_path / "outside.faiss")
    vectors.symlink_to(tmp_path / "outside.faiss")
    for read in (RetrievalIndex.load, RetrievalIndex.verify):
        with pytest.raises(UserError, match="are a link that leads out of the folder; copy the file there"):
            read(tmp_path / "index")
    (tmp_path / "linked").symlink_to(tmp_path / "index")
    (tmp_path / "outside.faiss").rename(tmp_path / "index" / "inside.faiss")
    vectors.unlink()
    vectors.symlink_to("inside.faiss")
    assert len(RetrievalIndex.load(tmp_path / "linked")) == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": None}, "'factory' in its description"),
        ({"factory": 3}, "'factory' in its description"),
        ({"distance": None}, "'distance' in its description"),
        ({"distance": "manhattan"}, "'distance' in its description"),
        ({"distance": ["cosine"]}, "'distance' in its description"),
        ({"fingerprint": 3}, "'fingerprint' in its description"),
        ({"checksums": {}}, "'checksums' in its description"),
        ({"checksums": "abc"}, "'checksums' in its description"),
        ({"distance": "euclidean"}, "is an index for another distance than 'euclidean'"),
        ({"kind": None}, "holds None, not an index"),
        ({"tensors": {"ids": IDS}}, r"it has no int64 tensor 'labels' of shape \[G\]"),
        ({"tensors": {"labels": LABELS}}, r"it has no int64 tensor 'ids' of shape \[G\]"),
        ({"tensors": {"ids": IDS.float(), "labels": LABELS}}, "no int64 tensor 'ids'"),
        ({"tensors": {"ids": IDS, "labels": LABELS[:, None]}}, "no int64 tensor 'labels'"),
        ({"tensors": {"ids": IDS, "labels": LABELS[1:]}}, "it has 200 ids but 199 labels"),
        ({"tensors": {"ids": IDS[1:], "labels": LABELS[1:]}}, "has 200 vectors but 199 ids"),
    ],
)
def test_damaged_descriptions_are_one_sentence(changes, message, tmp_path):
    build().save(tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        RetrievalIndex.load(tmp_path)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,SQ8"])
def test_a_flipped_bit_is_noticed_or_harmless(factory, tmp_path):
    build(factory).save(tmp_path)
    expected, generator = build(factory), np.random.default_rng(0)
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        positions = [*range(0, 64, 3), *generator.integers(len(whole), size=150)]
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << generator.integers(8)
            path.write_bytes(damaged)
            try:
                loaded = RetrievalIndex.load(tmp_path)
            except UserError:
                continue
            assert path.suffix != ".faiss"
            assert repr(loaded) == repr(expected)
            assert torch.equal(loaded.ids, expected.ids) and torch.equal(loaded.labels, expected.labels)
            assert_same(search(loaded), search(expected))
        path.write_bytes(whole)


def test_verify_names_the_damaged_file_and_a_mapped_file_is_checked_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr("mas_embed.retrieval.index_folder._START_SIZE", 1000)
    build().save(tmp_path)
    RetrievalIndex.verify(tmp_path)
    (vectors,) = tmp_path.glob("*.faiss")
    whole = vectors.read_bytes()
    for position, is_at_start in ((999, True), (1000, False)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        vectors.write_bytes(damaged)
        for read in (RetrievalIndex.verify, RetrievalIndex.load):
            with pytest.raises(UserError, match=f"{vectors.name} is damaged: it has changed since the index was saved"):
                read(tmp_path)
        if is_at_start:
            with pytest.raises(UserError, match="is damaged"):
                RetrievalIndex.load(tmp_path, memory_map=True)
        else:
            assert len(RetrievalIndex.load(tmp_path, memory_map=True)) == 200
    for damaged in (whole[:-1], whole + b"0"):
        vectors.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            RetrievalIndex.load(tmp_path, memory_map=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save an index into .*file: it is a file, not a folder; name another"):
        build().save(tmp_path / "file")
    with pytest.raises(UserError, match="file does not exist; make it first"):
        build().save(tmp_path / "file" / "index")
    with pytest.raises(UserError, match="cannot write .*: File name too long"):
        build().save(tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*: Permission denied"):
        build().save(tmp_path)


FULL_DISK = """
import resource, signal, sys, torch
from mas_embed import RunError
from mas_embed.retrieval import RetrievalIndex
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    RetrievalIndex.build(torch.randn(2000, int(sys.argv[3])), torch.arange(2000)).save(sys.argv[1])
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(
    ("size", "limit", "name"),
    [(8, 20_000, "vectors-.*faiss"), (8, 64_010, "vectors-.*faiss"), (1, 20_000, "items.safetensors")],
    ids=["vectors", "last bytes of the vectors", "ids"],
)
def test_a_full_disk_leaves_the_index_and_nothing_else(size, limit, name, tmp_path):
    build().save(tmp_path / "index")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "index"), str(limit), str(size)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search(f"cannot write .*{name}.*: File too large", printed.stdout), printed
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
    assert_same(search(RetrievalIndex.load(tmp_path / "index")), search(build()))


@pytest.mark.parametrize(
    "factory",
    [
        *("HNSW0", "HNSW1", "HNSW0_SQ8", "HNSW8_0+PQ2", "HNSW8_PQ2x0", "IVF4_HNSW1,Flat", "IVF4(HNSW0),Flat"),
        *(
            "PQ1x0",
            "PQ2x4fs_0",
            "IVF4,PQ2x0",
            "OPQ2_0,PQ2x4",
            "PCAR0,Flat",
            "RR0,Flat",
            "RR65536,Flat",
            "RR99999999,Flat",
        ),
        *("IVF4,ITQ0,SH0", "Flat,Refine(HNSW0)", "RQ0x8", "RQ2x0", "RQ999999999x8", "LSQ2x0", "PRQ2x0x4", "PLSQ2x2x0"),
        *("ZnLattice0x4_4", "RaBitQfs_0", "IVF4,FlatPanorama0", "HNSW999999999", "IVF99999999999,Flat"),
    ],
)
def test_sizes_with_which_faiss_ends_the_process_are_refused(factory):
    with pytest.raises(UserError, match="the number after '.*' in factory '.*' must be from [12] to "):
        build(factory)


@pytest.mark.parametrize("factory", ["NSG32", "NSG", "IVF4_NSG8,Flat", "RQ2x4_Ncqint8"])
def test_indexes_that_faiss_does_not_build_safely_are_refused(factory):
    with pytest.raises(UserError, match="which FAISS does not build safely; use 'HNSW32' or 'IVF'"):
        build(factory)


@pytest.mark.parametrize(
    "factory", [None, 3, "Flat," * 3000 + "Flat", "(" * 20_000, "x" * 100_000, "Flät", b"Flat", "Flat\0", "Flat\n"]
)
def test_factories_that_are_no_short_text_are_refused(factory):
    with pytest.raises(
        UserError, match="factory must be a description for FAISS's index_factory of at most 200"
    ) as caught:
        build(factory)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("factory", ["", " ", "()", "IVF4,IDMap", "IVF4(", ","])
def test_other_nonsense_is_refused_by_faiss(factory):
    with pytest.raises(UserError, match="FAISS cannot make an index|cannot add to an index"):
        build(factory)


def test_an_index_that_ignores_the_distance_is_refused():
    with pytest.raises(
        UserError, match="cannot make an index 'HNSW8,PQ2x4' for cosine.*: it supports other distances only"
    ):
        build("HNSW8,PQ2x4")
    assert search(build("HNSW8,PQ2x4", distance="euclidean")).is_found.all()


@pytest.mark.parametrize("k", [2.5, 2.0, True, "3", None, float("nan"), [1], torch.tensor(1.5)])
def test_a_number_of_neighbours_that_is_no_whole_number_is_refused(k):
    with pytest.raises(UserError, match="k must be a whole number, got"):
        search(build(), k=k)
    with pytest.raises(UserError, match="k must be a whole number, got"):
        build().recall_against_exact(QUERIES, GALLERY, k)


def test_a_number_of_neighbours_may_be_of_numpy():
    assert_same(search(build(), k=np.int64(2)), search(build(), k=2))


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        *(
            ("IVF4,Flat", {"nprobe": value}, "nprobe must be")
            for value in (-1, 0, 2**31, float("nan"), float("inf"), 1.5)
        ),
        *(("IVF4,Flat", {"nprobe": value}, "nprobe must be a whole number") for value in ("4", True, None, [4])),
        *(("HNSW8", {"efSearch": value}, "efSearch must be") for value in (-1, 0, float("nan"), 1.5, 2**40)),
        ("IVF4_HNSW8,Flat", {"quantizer_efSearch": 0}, "quantizer_efSearch must be from 1 to"),
        ("Flat,RFlat", {"k_factor_rf": 0.5}, "k_factor_rf must be from 1 to"),
        ("Flat,RFlat", {"k_factor_rf": float("nan")}, "k_factor_rf must be a finite number"),
        ("IVF4,Flat", {3: 4}, "the name of a search parameter must be a string, got 3"),
        ("IVF4,Flat", [("nprobe", 4)], "parameters must be a mapping from name to value, got list"),
        ("IVF4,Flat", {"nprobes": 4}, "cannot set 'nprobes' of an index 'IVF4,Flat'"),
    ],
)
def test_search_parameters_out_of_range_are_refused_at_once(factory, parameters, message):
    index = build(factory)
    with pytest.raises(UserError, match=message):
        index.set_search_parameters(parameters)


def test_search_parameters_may_be_of_numpy_and_a_factor_a_fraction():
    index = build("IVF4,SQ8,RFlat")
    index.set_search_parameters({"nprobe": np.int64(4), "k_factor_rf": 2.5})
    assert search(index).is_found.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1, "training_size": 50}, "seed must be a whole number >= 0"),
        ({"seed": 1.5}, "seed must be a whole number >= 0"),
        ({"seed": 2**70}, "seed must be a whole number >= 0 and <= 9223372036854775807"),
        ({"training_size": 50.0}, "training_size must be a whole number >= 1, got 50.0"),
        ({"training_size": True}, "training_size must be a whole number >= 1, got True"),
        ({"fingerprint": 3}, "fingerprint must be a model or its fingerprint, got an object of type int"),
        ({"device": "nowhere"}, "device must be 'cpu' or, for example, 'cuda' or 'cuda:1', got 'nowhere'"),
        ({"device": 1.5}, "device must be 'cpu'"),
        ({"distance": None}, "distance must be one of cosine"),
        ({"ids": [True] * 200}, "ids must be integers of shape"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        build("IVF4,Flat", **options)


def test_a_gpu_that_is_not_there_is_one_sentence():
    number = import_faiss().get_num_gpus()
    with pytest.raises(UserError, match=f"FAISS sees {number} GPUs here, so an index cannot be on 'cuda:{number}'"):
        build(device=f"cuda:{number}")
    assert build().to("cpu").device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(import_faiss().get_num_gpus() == 0, reason="FAISS sees no GPU")
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_gpu_finds_the_same_for_any_k(factory, tmp_path):
    gallery = random(3000, 8)
    options = {"factory": factory, "fingerprint": "one"}
    expected = RetrievalIndex.build(gallery, torch.arange(3000), **options)
    expected.set_search_parameters({"nprobe": 4} if "IVF" in factory else {})
    index = expected.to("cuda")
    for k in (5, 2500):
        np.testing.assert_allclose(search(index, k=k).scores, search(expected, k=k).scores, rtol=1e-4)
    index.add(QUERIES, torch.arange(12))
    assert (search(index, k=1).ids[:, 0] >= 3000).all()
    assert (search(index, k=2500).ids[:, 0] >= 3000).all()
    index.save(tmp_path / "index")
    assert len(RetrievalIndex.load(tmp_path / "index")) == 3012
