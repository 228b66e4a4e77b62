import pytest
import torch

from mas_embed import UserError, digits


def test_the_digits_are_divided_without_overlap():
    test, validation = digits(held_out="test"), digits(held_out="validation")
    assert [split.name for split in test] == ["0-1", "2-3", "4-5", "6-7", "8-9"]
    for test_split, validation_split in zip(test, validation, strict=True):
        assert torch.equal(test_split.train.ids, validation_split.train.ids)
        parts = [set(part.ids.tolist()) for part in (test_split.train, test_split.query, validation_split.query)]
        assert sum(map(len, parts)) == len(set.union(*parts))
    everything = [i for s in test for i in (*s.train.ids.tolist(), *s.query.ids.tolist())]
    everything += [i for s in validation for i in s.query.ids.tolist()]
    assert sorted(everything) == list(range(1797))


def test_every_class_is_in_every_part_of_its_split_alone():
    for index, split in enumerate(digits()):
        for part in (split.train, split.query, split.gallery):
            assert part.labels.unique().tolist() == [2 * index, 2 * index + 1]
            assert part.inputs.shape[1:] == (1, 8, 8)
            assert 0 <= part.inputs.min() <= part.inputs.max() <= 1
        assert split.query is split.gallery


def test_images_go_with_their_labels():
    from sklearn.datasets import load_digits

    raw = load_digits()
    part = digits(num_splits=10)[3].train
    for image, label, index in zip(part.inputs, part.labels, part.ids, strict=True):
        assert raw.target[index] == label == 3
        assert torch.equal(image[0], torch.tensor(raw.images[index] / 16, dtype=torch.float32))


def test_the_seed_decides_the_partition():
    assert torch.equal(digits(seed=1)[0].train.ids, digits(seed=1)[0].train.ids)
    assert not torch.equal(digits(seed=1)[0].query.ids, digits(seed=2)[0].query.ids)


def test_errors():
    with pytest.raises(UserError, match="num_splits must divide"):
        digits(num_splits=3)
    with pytest.raises(UserError, match="held_out must be 'test' or 'validation'"):
        digits(held_out="train")
