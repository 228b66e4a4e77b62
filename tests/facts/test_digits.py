import pytest
import torch

from mas_embed import UserError
from mas_embed.data import partition
from mas_embed.facts import fact_digits
from mas_embed.facts.digits import digit_facts


def test_the_table_of_facts():
    facts = digit_facts()
    assert len(set(facts.words)) == len(facts) == 186
    assert torch.bincount(facts.orders).tolist() == [0, 10, 56, 120]
    assert {"<three>", "<three, mirrored>", "<three, above, seven>"} <= set(facts.names)
    assert not {"<eight, mirrored>", "<zero, lying>"} & set(facts.names)
    assert facts.vectors.shape == (186, 3, 24)


def test_every_fact_is_in_one_split_with_as_many_images_as_asked():
    splits = fact_digits(train_images=3, held_out_images=2)
    assert [split.name for split in splits] == ["1", "2", "3", "4"]
    labels = [set(split.train.labels.tolist()) for split in splits]
    assert sorted(map(len, labels)) == [46, 46, 47, 47] and len(set.union(*labels)) == 186
    for split, facts in zip(splits, labels, strict=True):
        assert split.query is split.gallery and set(split.query.labels.tolist()) == facts
        assert torch.bincount(split.train.labels)[sorted(facts)].tolist() == [3] * len(facts)
        assert len(split.query) == 2 * len(facts)
        for part in (split.train, split.query):
            assert part.inputs.shape[1:] == (1, 32, 32) and part.inputs.dtype == torch.float32
            assert part.inputs.min() >= 0 and part.inputs.max() <= 1
            assert (part.inputs.flatten(1).amax(1) > 0.5).all()
    ids = torch.cat([part.ids for split in splits for part in (split.train, split.query)])
    assert len(ids.unique()) == len(ids) == 186 * 5


def single(facts, name, **options):
    """Images of one fact."""
    part = fact_digits(num_splits=1, **options)[0].train
    return part.inputs[part.labels == facts.names.index(name)][:, 0]


def tile(image):
    """The digit cut out of its canvas."""
    rows, columns = image.sum(1).nonzero()[:, 0], image.sum(0).nonzero()[:, 0]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_images_show_their_facts():
    facts, options = digit_facts(), {"train_images": 6, "image_size": 40}
    above = single(facts, "<three, above, seven>", **options)
    left = single(facts, "<three, left, seven>", **options)
    assert (above[:, :20].flatten(1).amax(1) > 0.5).all() and (above[:, 20:].flatten(1).amax(1) > 0.5).all()
    assert (left[:, :, :20].flatten(1).amax(1) > 0.5).all() and (left[:, :, 20:].flatten(1).amax(1) > 0.5).all()
    large, usual = (single(facts, name, **options) for name in ("<three, large>", "<three>"))
    assert min(len(tile(image)) for image in large) > max(len(tile(image)) for image in usual)
    framed = single(facts, "<three, framed>", **options)
    assert all((tile(image)[0] == 1).all() and (tile(image)[:, -1] == 1).all() for image in framed)
    assert (single(facts, "<three, inverted>", **options).mean((1, 2)) > usual.mean((1, 2)).max()).all()


def test_parts_are_composed_from_different_digits():
    from sklearn.datasets import load_digits

    values = torch.tensor(load_digits().target)
    train, test = partition(values, "test", 0)
    same, validation = partition(values, "validation", 0)
    assert torch.equal(train, same)
    assert len(set(train.tolist()) | set(test.tolist()) | set(validation.tolist())) == len(values)
    assert len(train) + len(test) + len(validation) == len(values)
    options = {"train_images": 2, "held_out_images": 2, "num_splits": 1}
    on_test, on_validation = fact_digits(**options)[0], fact_digits(held_out="validation", **options)[0]
    assert torch.equal(on_test.train.inputs, on_validation.train.inputs)
    assert not torch.equal(on_test.query.inputs, on_validation.query.inputs)
    assert not set(on_test.query.ids.tolist()) & set(on_validation.query.ids.tolist())


def test_the_seed_changes_images_and_splits_but_not_facts():
    options = {"train_images": 1, "held_out_images": 2}
    first, again, other = (fact_digits(seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first[0].train.inputs, again[0].train.inputs)
    assert first[0].train.labels.tolist() != other[0].train.labels.tolist()
    assert torch.equal(first.facts.vectors, other.facts.vectors)


def test_in_colour_and_semantic():
    splits = fact_digits(channels=3, splits="semantic", image_size=28, train_images=1, held_out_images=2)
    assert splits[0].train.inputs.shape[1:] == (3, 28, 28)
    assert torch.equal(splits[0].train.inputs[:, 0], splits[0].train.inputs[:, 2])
    # Related facts go together: a split has fewer different predicates than a random one
    predicates = [len({splits.facts.words[i][1] for i in split.train.labels}) for split in splits]
    shuffled = fact_digits(train_images=1, held_out_images=2)
    assert sum(predicates) < sum(len({shuffled.facts.words[i][1] for i in split.train.labels}) for split in shuffled)


def test_options_outside_their_range_are_refused():
    with pytest.raises(
        UserError, match="image_size must lie between 28 and 64 and channels must be 1 or 3, got 20 and 1"
    ):
        fact_digits(image_size=20)
    with pytest.raises(UserError, match="channels must be 1 or 3, got 32 and 2"):
        fact_digits(channels=2)
    with pytest.raises(
        UserError,
        match="at least 1 training image and 2 held-out images, and at most 1000 of each, got .* held_out_images=1",
    ):
        fact_digits(held_out_images=1)
    with pytest.raises(UserError, match="at most 1000 of each, got train_images=1000000000"):
        fact_digits(train_images=10**9)
    with pytest.raises(UserError, match="num_splits must lie between 1 and 186"):
        fact_digits(num_splits=0)
