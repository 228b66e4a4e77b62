import numpy as np
import pytest
import torch

from mas_embed import Part, Split, SplitSequence, UserError, digits, join_splits
from mas_embed.data import check_splits, join_parts, ordered_batches


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
    for labels, got in (
        (torch.tensor([0.2, 0.7, 1.2]), "torch.float32"),
        ([0.0, 1.0, 2.0], "torch.float64"),
        (torch.tensor([True, False, True]), "torch.bool"),
        (np.array([1j, 2, 3]), "torch.complex128"),
        (torch.zeros(3, 1, dtype=torch.int64), r"torch.int64 of shape \[3, 1\]"),
    ):
        with pytest.raises(UserError, match=rf"the labels of a part must be integers of shape \[N\], got {got}"):
            Part(torch.zeros(3, 2), labels)
        with pytest.raises(UserError, match=rf"the ids of a part must be integers of shape \[N\], got {got}"):
            Part(torch.zeros(3, 2), [0, 1, 2], labels)
    for labels in (None, ["a", "b", "c"], [[0], [1, 2]], {0, 1, 2}, [2**70, 0, 1]):
        with pytest.raises(UserError, match="the labels of a part must be"):
            Part(torch.zeros(3, 2), labels)
    with pytest.raises(UserError, match=r"the labels of a part must be less than 2\^63"):
        Part(torch.zeros(1, 2), np.array([2**63], dtype=np.uint64))


@pytest.mark.parametrize("make", [list, np.array, lambda values: np.array(values, dtype=np.uint8), torch.tensor])
def test_labels_and_ids_of_any_kind_become_int64_tensors(make):
    part = Part(np.eye(3, dtype=np.float32), make([5, 6, 7]), make([1, 2, 3]))
    assert part.labels.dtype == part.ids.dtype == torch.int64
    assert part.labels.tolist() == [5, 6, 7]
    assert part.ids.tolist() == [1, 2, 3]
    inputs, labels = next(iter(ordered_batches(part, batch_size=2)))
    assert torch.equal(inputs, torch.eye(3)[:2])
    assert labels.tolist() == [5, 6]
    assert len(join_parts([part, part])) == 6


@pytest.mark.parametrize(
    "inputs",
    [{"x": torch.eye(3)}, {1, 2, 3}, (x for x in range(3)), "abc", None, 3, torch.tensor(1.0), np.array(1.0)],
    ids=lambda inputs: type(inputs).__name__,
)
def test_inputs_that_are_no_sequence_are_refused(inputs):
    with pytest.raises(
        UserError, match="the inputs of a part must be a tensor, an array or a sequence with a length, got"
    ):
        Part(inputs, [0, 1, 2])


def test_an_archive_of_arrays_is_no_sequence_of_inputs(tmp_path):
    np.savez(tmp_path / "inputs.npz", images=np.eye(3))
    with np.load(tmp_path / "inputs.npz") as archive, pytest.raises(UserError, match="got an object of type NpzFile"):
        Part(archive, [0, 1, 2])


def test_splits_that_are_none_are_refused():
    part = Part(torch.eye(3), torch.tensor([5, 6, 7]))
    split = Split("a", part, part, part)
    check_splits([split])
    for splits, message in (
        (None, "splits must be a sequence of Split, got an object of type NoneType"),
        (iter([split]), "splits must be a sequence of Split, got an object of type list_iterator"),
        ({"a": split}, "splits must be a sequence of Split, got an object of type dict"),
        ("abc", "splits must be a sequence of Split, got an object of type str"),
        (split, "splits must be a sequence of Split, got an object of type Split"),
        ([split, part], "splits must be a sequence of Split, got one that holds an object of type Part"),
        ([], "a sequence needs at least one split"),
        ([Split(["a"], part, part, part)], "the name of a split must be a string"),
        ([Split("a", part, None, part)], "query of split 'a' must be a Part, got an object of type NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            check_splits(splits)
