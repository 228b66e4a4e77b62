import subprocess
import sys

import numpy as np
import pytest
import torch

from mas_embed import UserError
from mas_embed.retrieval import embed, find_nearest
from mas_embed.retrieval.similarity import prepare_rows


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_finds_the_nearest_by_full_sort(distance):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(9, 4, generator=generator), torch.randn(40, 4, generator=generator)
    scores, positions = find_nearest(queries, gallery, 5, distance=distance)
    expected = {
        "cosine": torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T,
        "euclidean": -(torch.cdist(queries, gallery) ** 2),
        "inner_product": queries @ gallery.T,
    }[distance]
    best = expected.topk(5)
    np.testing.assert_array_equal(positions, best.indices)
    unit = scores / best.values.numpy()  # the same constant for all queries and items
    np.testing.assert_allclose(unit, np.full_like(unit, unit[0, 0]), rtol=1e-3)
    if distance == "cosine":
        np.testing.assert_allclose(scores, best.values, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_gallery_is_refused(k):
    with pytest.raises(UserError, match="k must lie between 1 and the gallery's size, 3"):
        find_nearest(torch.ones(1, 2), torch.ones(3, 2), k)


@pytest.mark.parametrize("k", [1.5, True, "1", None, float("nan"), 2**80 + 0.5])
def test_k_that_is_no_whole_number_is_refused(k):
    with pytest.raises(UserError, match="k must be a whole number, got"):
        find_nearest(torch.ones(1, 2), torch.ones(3, 2), k)
    assert find_nearest(torch.ones(1, 2), torch.ones(3, 2), np.int64(1))[1].shape == (1, 1)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_sizes_and_devices_must_be_equal(distance):
    with pytest.raises(UserError, match="queries have 4 dimensions and the gallery 2; embed both with one model"):
        find_nearest(torch.ones(1, 4), torch.ones(3, 2), 1, distance=distance)
    with pytest.raises(UserError, match="queries are on cpu and the gallery on meta; move both to one device"):
        prepare_rows(torch.ones(1, 2), torch.ones(3, 2, device="meta"), distance)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
def test_neither_overflow_nor_underflow_loses_neighbours(scale, distance):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(9, 4, generator=generator), torch.randn(40, 4, generator=generator)
    expected = find_nearest(queries, gallery, 5, distance=distance)[1]
    np.testing.assert_array_equal(find_nearest(queries * scale, gallery * scale, 5, distance=distance)[1], expected)


def test_torch_is_imported_before_faiss():
    code = "import sys; from mas_embed.retrieval.search import import_faiss; import_faiss(); m = list(sys.modules); assert m.index('torch') < m.index('faiss')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embed_keeps_the_order_and_restores_the_mode():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.9))
    inputs = torch.randn(7, 3)
    embeddings = embed(model, inputs.split(3))
    torch.testing.assert_close(embeddings, model[0](inputs))
    assert not embeddings.requires_grad
    assert model.training
    with pytest.raises(UserError, match="nothing to embed"):
        embed(model, [])
