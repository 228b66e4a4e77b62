import math

import pytest
import torch

from mas_embed.losses import embedding_distillation, similarity_distillation

OLD = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
NEW = torch.tensor([[2.0, 0.0], [2.0, 3.0]]).double()


def test_embedding_distillation_by_hand():
    # squared distances 1^2 and 1^2 + 2^2
    assert embedding_distillation(NEW, OLD).item() == (1 + 5) / 2


def test_similarity_distillation_by_hand():
    # the cosine of the two is 2 / sqrt(13), and was 1 / sqrt(2); it occurs twice in a matrix of four
    expected = 2 * (2 / math.sqrt(13) - 1 / math.sqrt(2)) ** 2 / 4
    assert similarity_distillation(NEW, OLD).item() == pytest.approx(expected, rel=1e-12)


def test_equal_embeddings_have_no_distance():
    assert embedding_distillation(OLD, OLD).item() == similarity_distillation(OLD, OLD).item() == 0


def test_similarity_distillation_ignores_lengths_and_rotations():
    rotation = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
    lengths = torch.tensor([[2.0], [5.0]]).double()
    assert similarity_distillation(lengths * OLD @ rotation, OLD).item() < 1e-30


def test_both_have_a_gradient_in_the_new_embeddings():
    for distance in (embedding_distillation, similarity_distillation):
        new = NEW.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda values, distance=distance: distance(values, OLD), new)
