import pytest
import torch
from small import small_splits

from mas_embed import Part, Split, SplitSequence, UserError
from mas_embed.data import select_subset


class OnDemand:
    """Inputs that are not a tensor: item i is the number i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)])


def named_splits():
    """Labels 0 and 1 in split a and label 2 in split b; 0 and 2 share a name."""
    parts = [Part(torch.zeros(2, 1), torch.tensor(labels)) for labels in ([0, 1], [2, 2])]
    splits = [Split(name, part, part, part) for name, part in zip("ab", parts, strict=True)]
    return SplitSequence(splits, label_names={"cat": [0, 2], "dog": [1]})


def test_a_subset_is_selected_by_split_part_and_label():
    splits = small_splits()
    subset = select_subset(splits, split="s1", part="query", labels=[3])
    assert subset.splits == [1]
    assert subset.labels.tolist() == [3]
    assert subset.part.labels.tolist() == [3] * 6
    is_three = splits[1].query.labels == 3
    assert torch.equal(subset.part.inputs, splits[1].query.inputs[is_three])
    assert torch.equal(subset.part.ids, splits[1].query.ids[is_three])


def test_without_criteria_every_training_item_is_selected():
    splits = small_splits()
    everything = select_subset(splits)
    assert everything.splits == [0, 1, 2]
    assert everything.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(everything.part) == sum(len(split.train) for split in splits)


def test_a_name_selects_all_labels_that_have_it():
    splits = named_splits()
    assert select_subset(splits, labels=["cat"]).labels.tolist() == [0, 2]
    assert select_subset(splits, split="b", labels=["cat"]).labels.tolist() == [2]
    assert select_subset(splits, labels=["dog", 2]).labels.tolist() == [1, 2]


def test_inputs_that_load_on_demand_still_do():
    part = Part(OnDemand(4), torch.tensor([0, 1, 0, 1]))
    subset = select_subset([Split("a", part, part, part)], labels=[1])
    assert [float(subset.part.inputs[index]) for index in range(2)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (small_splits(), {"split": "s7"}, "unknown split 's7': did you mean"),
        (small_splits(), {"part": "test"}, "part must be 'train', 'query' or 'gallery', got 'test'"),
        (small_splits(), {"split": "s0", "labels": [3]}, "the train part of split 's0' has no item with the label 3"),
        (small_splits(), {"labels": [99]}, "the train part of all splits has no item with the label 99"),
        (small_splits(), {"labels": ["three"]}, "have no names; give them as numbers, got 'three'"),
        (
            named_splits(),
            {"split": "b", "labels": ["dog"]},
            "the train part of split 'b' has no item with the label dog",
        ),
        (named_splits(), {"labels": ["cats"]}, "unknown label 'cats': did you mean 'cat'"),
    ],
)
def test_errors(splits, options, message):
    with pytest.raises(UserError, match=message):
        select_subset(splits, **options)
