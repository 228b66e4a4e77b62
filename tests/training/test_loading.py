import numpy as np
import pytest
import torch

from mas_embed import Part, UserError, per_class_sampler
from mas_embed.data import ordered_batches
from mas_embed.training import training_batches


def part(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Part(torch.arange(float(len(labels))).unsqueeze(1), labels)


def test_without_a_sampler_an_epoch_is_every_item_once_in_another_order():
    torch.manual_seed(0)
    batches = training_batches(part([5, 6]), batch_size=4, sampler=None)
    one, two = ([int(x) for inputs, _ in batches for x in inputs] for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(11))
    assert one != two
    assert len(batches) == 3


def test_the_sampler_makes_an_epoch_of_one_pass_and_batches_with_every_class():
    data = part([20, 25])
    batches = list(training_batches(data, batch_size=8, sampler=lambda labels: per_class_sampler(labels, m=4)))
    assert sum(len(labels) for _, labels in batches) == 48  # 45, rounded up to turns of 8
    assert all(labels.bincount().tolist() == [4, 4] for _, labels in batches)


def test_the_sampler_deals_m_of_each_class_where_classes_are_many():
    for _, labels in training_batches(
        part([6] * 20), batch_size=8, sampler=lambda labels: per_class_sampler(labels, m=4)
    ):
        assert sorted(labels.bincount()[labels.unique()].tolist()) == [4, 4]


def test_a_class_with_too_few_images_is_refused():
    with pytest.raises(UserError, match="m=4 images per class, but class 1 has 3"):
        per_class_sampler(part([5, 3]).labels, m=4)


@pytest.mark.parametrize("m", [2.0, True, "2", None, float("nan")])
def test_a_number_per_class_that_is_no_whole_number_is_refused(m):
    with pytest.raises(UserError, match="the sampler's m, images per class, must be a whole number, got"):
        per_class_sampler(part([5, 5]).labels, m=m)
    assert len(per_class_sampler(part([4, 4]).labels, m=np.int64(2))) == 8


def test_a_sampler_of_no_labels_is_refused():
    with pytest.raises(UserError, match="the sampler needs at least one label, got none"):
        per_class_sampler(torch.empty(0, dtype=torch.int64), m=2)


def test_ordered_batches_draw_nothing_at_random():
    state = torch.get_rng_state()
    inputs = torch.cat([inputs for inputs, _ in ordered_batches(part([5, 6]), batch_size=4)])
    assert inputs[:, 0].tolist() == list(range(11))
    assert torch.equal(state, torch.get_rng_state())
