"""Retrieval measures of CUDA tensors, compared with those of CPU tensors."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mas_embed import compare_indexes, evaluate_retrieval
from mas_embed.retrieval import clustering_scores, embed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def problem(num_queries=70, num_gallery=500, num_classes=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_queries + num_gallery, 16, generator=generator, dtype=dtype)
    labels = torch.randint(num_classes, (len(rows),), generator=generator)
    rows[::3] = rows[labels[::3]]  # equal scores
    return rows[:num_queries], labels[:num_queries], rows[num_queries:], labels[num_queries:]


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "inner_product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "num_classes", [2, 50]
)  # with two classes, the scores are sorted; with many, they are compared
@pytest.mark.parametrize("memory_mib", [1, 256])
def test_the_measures_are_those_of_the_cpu(distance, dtype, num_classes, memory_mib):
    queries, query_labels, gallery, gallery_labels = problem(num_classes=num_classes, dtype=torch.float64)
    arguments = (queries.to(dtype), query_labels, gallery.to(dtype), gallery_labels)
    options = {
        "distance": distance,
        "memory_mib": memory_mib,
        "ndcg_at": [5],
        "precision_at": [3],
        "average_precision_at": [7],
    }
    expected = evaluate_retrieval(*arguments, **options)
    scores = evaluate_retrieval(*(argument.cuda() for argument in arguments), **options)
    for name, values in expected.per_query.items():
        np.testing.assert_allclose(scores.per_query[name], values, rtol=1e-12, err_msg=name)


def test_labels_and_lists_may_be_on_the_cpu():
    queries, query_labels, gallery, gallery_labels = problem()
    expected = evaluate_retrieval(queries, query_labels, gallery, gallery_labels).means
    mixed = evaluate_retrieval(queries.cuda(), query_labels, gallery.cuda(), gallery_labels.numpy())
    assert mixed.means == pytest.approx(expected, rel=1e-12)
    lists = [(gallery_labels == label).nonzero()[:, 0].tolist() or [0] for label in query_labels]
    expected = evaluate_retrieval(queries, None, gallery, relevant=lists).means
    listed = evaluate_retrieval(queries.cuda(), None, gallery.cuda(), relevant=lists)
    assert listed.means == pytest.approx(expected, rel=1e-12)


def test_queries_that_are_the_gallery():
    _, _, gallery, labels = problem()
    expected = evaluate_retrieval(gallery, labels).means
    assert evaluate_retrieval(gallery.cuda(), labels.cuda()).means == pytest.approx(expected, rel=1e-12)


def test_the_comparison_of_indexes_is_that_of_the_cpu():
    old_queries, labels, old_gallery, gallery_labels = problem()
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    new = [rows @ rotation + 0.3 * torch.randn(rows.shape, generator=generator) for rows in (old_queries, old_gallery)]
    embeddings = (old_queries, new[0], old_gallery, new[1])
    options = {"fit_on": (old_gallery[:100], new[1][:100])}
    expected = compare_indexes(*embeddings, labels, gallery_labels, **options)
    options = {"fit_on": tuple(rows.cuda() for rows in options["fit_on"])}
    compared = compare_indexes(*(rows.cuda() for rows in embeddings), labels, gallery_labels, **options)
    assert repr(compared.summary(after="split"))[:40] == repr(expected.summary(after="split"))[:40]
    first, second = (flat_numbers(vars(part.summary(after="split"))) for part in (compared, expected))
    assert first == pytest.approx(second, rel=1e-3, abs=1e-3)


def flat_numbers(values, prefix=""):
    result = {}
    for key, value in values.items():
        if hasattr(value, "__dict__"):
            value = vars(value)
        if isinstance(value, dict):
            result |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            result[f"{prefix}{key}"] = float(value)
    return result


def test_clustering():
    rows, labels = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5
    assert clustering_scores(rows.cuda(), labels.cuda()) == pytest.approx(clustering_scores(rows, labels), abs=0.05)


def test_embeddings_of_a_model_on_the_gpu(tmp_path):
    model = nn.Linear(3, 2).double()
    inputs = torch.randn(100, 3, dtype=torch.float64)
    expected = embed(model, inputs.split(7))
    on_gpu = copy.deepcopy(model).cuda()
    for batches in (inputs.split(7), inputs.cuda().split(7)):
        torch.testing.assert_close(embed(on_gpu, batches), expected)
        torch.testing.assert_close(embed(model, batches), expected)
    out = torch.empty(100, 2, dtype=torch.float64, device="cuda")
    assert embed(on_gpu, inputs.split(7), out=out) is out
    torch.testing.assert_close(out.cpu(), expected)
    torch.testing.assert_close(embed(on_gpu, inputs.split(7), out=tmp_path / "rows.npy"), expected)
