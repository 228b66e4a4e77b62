import pytest
import torch

from mas_embed import Part, Split, SplitSequence, UserError, digits, join_splits


def test_a_part_is_a_dataset_with_unique_ids():
    part, other = (Part(torch.eye(3), torch.tensor([5, 6, 7])) for _ in range(2))
    assert len({*part.ids.tolist(), *other.ids.tolist()}) == 6
    inputs, label = part[1]
    assert (inputs.tolist(), label) == ([0.0, 1.0, 0.0], 6)
    with pytest.raises(UserError, match="a part has 3 inputs, 2 labels and 2 ids; give as many of each"):
        Part(torch.eye(3), torch.tensor([5, 6]))


def test_joined_splits_hold_everything_in_order():
    splits = digits()
    joined = join_splits(splits)
    assert len(joined.train) == sum(len(split.train) for split in splits)
    assert torch.equal(joined.query.ids, torch.cat([split.query.ids for split in splits]))


def test_a_split_sequence_is_a_list_of_splits():
    part = Part(torch.eye(3), torch.tensor([5, 6, 7]))
    split = Split("a", part, part, part)
    plain = SplitSequence([split])
    assert plain == [split]
    assert plain.label_names == plain.provides == {}
    described = SplitSequence([split], label_names={"cat": [5, 6]}, provides={"vector_size": 3})
    assert described.label_names == {"cat": [5, 6]}
    assert described.provides == {"vector_size": 3}


def test_labels_that_are_not_integers_are_refused():
    with pytest.raises(UserError, match="the labels of a part must be integers, got torch.float32"):
        Part(torch.zeros(3, 2), torch.tensor([0.2, 0.7, 1.2]))
