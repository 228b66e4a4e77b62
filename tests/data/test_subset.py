import pytest
import torch
from small import small_splits

from mas_embed import UserError
from mas_embed.data import FactSequence, FactTable, Part, Split, fact_digits, make_fact_table, select_subset


class OnDemand:
    """Inputs that are no tensor: item i is the number i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)])


def test_a_subset_is_chosen_by_split_part_and_label():
    splits = small_splits()
    subset = select_subset(splits, split="s1", part="query", labels=[3])
    assert subset.splits == [1]
    assert subset.labels.tolist() == [3]
    assert subset.part.labels.tolist() == [3] * 6
    is_three = splits[1].query.labels == 3
    assert torch.equal(subset.part.inputs, splits[1].query.inputs[is_three])
    assert torch.equal(subset.part.ids, splits[1].query.ids[is_three])


def test_what_is_left_out_chooses_everything():
    splits = small_splits()
    everything = select_subset(splits)
    assert everything.splits == [0, 1, 2]
    assert everything.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(everything.part) == sum(len(split.train) for split in splits)


def test_facts_are_named_as_they_are_written():
    splits = fact_digits(train_images=2, held_out_images=2)
    split = next(split for split in splits if 3 in split.train.labels)
    subset = select_subset(splits, split=split.name, labels=["<three>"])
    assert subset.labels.tolist() == [3]
    assert len(subset.part) == 2


def test_a_name_means_all_its_facts_that_are_there():
    weights = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    words = [("cat", "", ""), ("dog", "", ""), ("cat", "", "")]
    table = FactTable(torch.arange(3), words, torch.ones(3, 3, 2), weights)
    parts = [Part(torch.zeros(2, 1), torch.tensor(labels)) for labels in ([0, 1], [2, 2])]
    splits = FactSequence([Split(name, part, part, part) for name, part in zip("ab", parts, strict=True)], table)
    assert select_subset(splits, labels=["<cat>"]).labels.tolist() == [0, 2]
    assert select_subset(splits, split="b", labels=["<cat>"]).labels.tolist() == [2]
    with pytest.raises(UserError, match="the train part of split 'b' has no item with the label <dog>"):
        select_subset(splits, split="b", labels=["<dog>"])


def test_inputs_that_load_on_demand_still_do():
    part = Part(OnDemand(4), torch.tensor([0, 1, 0, 1]))
    subset = select_subset([Split("a", part, part, part)], labels=[1])
    assert [float(subset.part.inputs[index]) for index in range(2)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "s7"}, "unknown split 's7': did you mean"),
        ({"part": "test"}, "unknown part 'test'"),
        ({"split": "s0", "labels": [3]}, "the train part of split 's0' has no item with the label 3"),
        ({"labels": [99]}, "the train part of all splits has no item with the label 99"),
        ({"labels": ["<three>"]}, "labels of data without facts are numbers, got '<three>'"),
    ],
)
def test_what_cannot_be_chosen(options, message):
    with pytest.raises(UserError, match=message):
        select_subset(small_splits(), **options)


def test_an_unknown_fact():
    part = Part(torch.zeros(2, 1), torch.tensor([0, 1]))
    table = make_fact_table([("cat", "", ""), ("dog", "", "")], {"cat": torch.eye(2)[0], "dog": torch.eye(2)[1]})
    with pytest.raises(UserError, match="unknown fact '<cats>': did you mean '<cat>'"):
        select_subset(FactSequence([Split("a", part, part, part)], table), labels=["<cats>"])
