"""The loss against one cross-entropy per head, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from mas_embed import UserError
from mas_embed.recognition import MultiHeadCrossEntropy
from mas_embed.recognition.heads import split_of_classes, without_other_heads

CLASSES = [2, 1, 4]


def random_batch(num=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    return scores, torch.randint(7, (num,), generator=generator)


def loss_by_loops(scores, labels):
    """The cross-entropy of every sample by torch's own, on the columns of its head."""
    values = []
    for row, label in zip(scores, labels.tolist(), strict=True):
        start = 0
        for number in CLASSES:
            if start <= label < start + number:
                values.append(F.cross_entropy(row[None, start : start + number], torch.tensor([label - start])))
            start += number
    return sum(values) / len(values)


def test_a_batch_of_several_splits_against_one_cross_entropy_per_head():
    scores, labels = random_batch()
    value, expected = MultiHeadCrossEntropy(CLASSES)(scores, labels), loss_by_loops(scores, labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, scores, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_by_hand():
    # own head (0, log 3): probability 3/4 of class 1; the other head's large scores do not count
    scores = torch.tensor([[0.0, math.log(3), 100.0, -100.0]])
    assert MultiHeadCrossEntropy([2, 2])(scores, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))
    assert MultiHeadCrossEntropy([2, 1])(scores[:, :3], torch.tensor([2])).item() == 0  # a head of one class


def test_other_heads_have_no_gradient_even_at_infinite_scores():
    scores = torch.tensor([[1.0, 2.0, torch.inf, 3.0]], requires_grad=True)
    MultiHeadCrossEntropy([2, 2])(scores, torch.tensor([0])).backward()
    assert scores.grad[0, 2:].tolist() == [0, 0]
    assert scores.grad[0, :2].abs().min() > 0


def test_classes_of_heads():
    assert split_of_classes(CLASSES).tolist() == [0, 0, 1, 2, 2, 2, 2]
    replaced = without_other_heads(torch.zeros(1, 7), torch.tensor([2]), split_of_classes(CLASSES))
    assert replaced.isfinite().tolist() == [[False, False, True, False, False, False, False]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"classes_per_split must be the number of classes of every split, as in \[10, 62\], got \[\]"),
        (5, "classes_per_split must be the number of classes of every split"),
        ("23", "classes_per_split must be the number of classes of every split"),
        ([2, 0], "every number in classes_per_split must be a whole number >= 1, got 0"),
        ([2, True], "every number in classes_per_split must be a whole number >= 1, got True"),
    ],
)
def test_numbers_of_classes_are_checked(classes, message):
    with pytest.raises(UserError, match=message):
        MultiHeadCrossEntropy(classes)


def test_scores_and_labels_are_checked():
    loss = MultiHeadCrossEntropy([2, 2])
    with pytest.raises(UserError, match=r"4 classes, so class scores must have shape \[N, 4\], got \[3, 5\]"):
        loss(torch.zeros(3, 5), torch.zeros(3).long())
    with pytest.raises(UserError, match="the labels of a batch must be from 0 to 3, .* got 1 to 4"):
        loss(torch.zeros(2, 4), torch.tensor([1, 4]))
    with pytest.raises(UserError, match="got -1 to 0"):
        loss(torch.zeros(2, 4), torch.tensor([-1, 0]))
