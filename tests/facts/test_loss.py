import pytest
import torch

from mas_embed import UserError
from mas_embed.facts import FactLoss, fact_loss


def loop(embeddings, vectors, weights, form):
    """The mean over samples of the weighted distances, number by number."""
    total = 0.0
    for sample in range(len(embeddings)):
        for slot in range(3):
            size = vectors.shape[2]
            squared = sum(
                (embeddings[sample, slot * size + index] - vectors[sample, slot, index]) ** 2 for index in range(size)
            )
            total = total + weights[sample, slot] * (squared**0.5 if form == "distance" else squared / 2)
    return total / len(embeddings)


def example(num_samples=5, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings, vectors = torch.randn(2, num_samples, 3 * size, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64)
    return embeddings, vectors.unflatten(1, (3, size)), weights[torch.arange(num_samples) % 3]


def test_two_samples_by_hand():
    embeddings = torch.tensor([[3.0, 4.0, 9.0, 9.0, 9.0, 9.0], [1.0, 0.0, 0.0, 2.0, 6.0, 8.0]])
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    vectors = torch.zeros(2, 3, 2)
    # Distances 5 | 1, 2, 10; squares 25 | 1, 4, 100
    assert fact_loss(embeddings, vectors, weights) == (5 + 13) / 2
    assert fact_loss(embeddings, vectors, weights, form="squared") == (25 + 105) / 2 / 2


@pytest.mark.parametrize("form", ["distance", "squared"])
@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_equals_the_loop(form, num_samples):
    embeddings, vectors, weights = example(num_samples)
    expected = loop(embeddings, vectors, weights, form)
    torch.testing.assert_close(fact_loss(embeddings, vectors, weights, form=form), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["distance", "squared"])
def test_every_sample_has_a_mask_of_its_fact(form):
    # [N, 1] * [N] would give every sample the mean of all masks
    embeddings, vectors, weights = example(3)
    embeddings.requires_grad_()
    fact_loss(embeddings, vectors, weights, form=form).backward()
    is_touched = embeddings.grad.unflatten(1, (3, 4)).abs().sum(2) > 0
    assert torch.equal(is_touched, weights > 0)


@pytest.mark.parametrize("form", ["distance", "squared"])
@pytest.mark.parametrize("anything", [float("nan"), float("inf"), 1e200])
def test_the_numbers_of_a_wildcard_do_not_count(form, anything):
    embeddings, vectors, weights = example(3)
    is_absent = (weights == 0)[:, :, None]
    results = []
    for absent in ((0.0, 0.0), (anything, 0.0), (0.0, anything)):
        values = embeddings.unflatten(1, (3, 4)).masked_fill(is_absent, absent[0]).flatten(1).requires_grad_()
        value = fact_loss(values, vectors.masked_fill(is_absent, absent[1]), weights, form=form)
        results.append((value, *torch.autograd.grad(value, values)))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("form", ["distance", "squared"])
def test_gradients_are_exact_and_zero_at_the_target(form):
    embeddings, vectors, weights = example(3)
    assert torch.autograd.gradcheck(
        lambda values: fact_loss(values, vectors, weights, form=form), embeddings.requires_grad_()
    )
    at_target = vectors.flatten(1).clone().requires_grad_()
    value = fact_loss(at_target, vectors, weights, form=form)
    value.backward()
    assert value == 0 and torch.equal(at_target.grad, torch.zeros_like(at_target))


def test_labels_are_rows_of_the_table():
    embeddings, vectors, weights = example(5)
    labels = torch.tensor([4, 0, 4])
    loss = FactLoss(vectors, weights, form="squared")
    expected = fact_loss(embeddings[:3], vectors[[4, 0, 4]], weights[[4, 0, 4]], form="squared")
    assert torch.equal(loss(embeddings[:3], labels, None), expected)
    assert not list(loss.parameters())


def test_the_dtype_is_that_of_the_embeddings():
    embeddings, vectors, weights = example(4)
    loss = FactLoss(vectors.float(), weights.float())
    assert loss(embeddings, torch.arange(4)).dtype == torch.float64
    assert loss(embeddings.bfloat16(), torch.arange(4)).dtype == torch.bfloat16


def test_arguments_that_do_not_fit_are_refused():
    embeddings, vectors, weights = example(5)
    with pytest.raises(UserError, match=r"needs embeddings \[N, 3 V\].* got \[5, 11\], \[5, 3, 4\] and \[5, 3\]"):
        fact_loss(embeddings[:, 1:], vectors, weights)
    with pytest.raises(UserError, match=r"got \[5, 12\], \[5, 3, 4\] and \[5\]"):
        fact_loss(embeddings, vectors, weights[:, 0])
    with pytest.raises(UserError, match=r"a table of facts has .* got \[5, 12\] and \[5, 3\]"):
        FactLoss(vectors.flatten(1), weights)
    with pytest.raises(UserError, match=r"of at least one sample, got \[0, 12\], \[0, 3, 4\] and \[0, 3\]"):
        fact_loss(embeddings[:0], vectors[:0], weights[:0])
    with pytest.raises(UserError, match=r"got \[5, 8\], \[5, 2, 4\] and \[5, 2\]"):
        fact_loss(embeddings[:, :8], vectors[:, :2], weights[:, :2])
    for wrong in (-weights, weights * float("nan")):
        with pytest.raises(UserError, match="the weights of facts must be >= 0"):
            FactLoss(vectors, wrong)
    loss = FactLoss(vectors, weights)
    for labels in ([-1, 0, 1, 2, 3], [0, 1, 2, 3, 5]):
        with pytest.raises(UserError, match=f"labels must be rows of the table of 5 facts, got {min(labels)} to"):
            loss(embeddings, torch.tensor(labels))
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.float32):
        with pytest.raises(UserError, match=f"labels of facts must be int64, got {dtype}"):
            loss(embeddings, torch.ones(5).to(dtype))
    for make in (
        lambda: fact_loss(embeddings, vectors, weights, form="l1"),
        lambda: FactLoss(vectors, weights, form="l1"),
    ):
        with pytest.raises(UserError, match="form of the fact loss must be 'distance' or 'squared', got 'l1'"):
            make()
