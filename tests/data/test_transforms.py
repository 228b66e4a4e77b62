import random

import numpy as np
import pytest
import torch
from small import pull_together
from torch import nn
from torchvision.transforms import v2

from mas_embed import (
    Method,
    Part,
    Recipe,
    RetrievalEvaluator,
    Split,
    UserError,
    digits,
    join_splits,
    train_sequence,
    training_batches,
)
from mas_embed.data import (
    NormalizedImages,
    fingerprint_of_split,
    join_parts,
    ordered_batches,
    select_subset,
    transform_splits,
)
from mas_embed.data.split import SplitSequence
from mas_embed.runtime.preprocessing import Preprocessing

CROP = v2.RandomCrop(6, padding=2)


def images(seed, count=12, channels=3):
    return torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))


def sequence(channels=3):
    splits = []
    for index in range(2):
        labels = torch.arange(12) % 2 + 2 * index
        held_out = Part(images(10 + index, channels=channels), labels)
        splits.append(Split(f"s{index}", Part(images(index, channels=channels), labels), held_out, held_out))
    return splits


class Noise:
    """Augmented inputs that draw from all three global generators."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + torch.rand(()) + np.random.rand() + random.random()


def augmented_part(count=7):
    inputs = torch.zeros(count, 1)
    return Part(inputs, torch.arange(count), augmented=Noise(inputs))


def epochs(part, num_workers, *, view="training", number=2, sampler=None, seed=0):
    torch.manual_seed(seed)
    batches = training_batches(part, batch_size=3, num_workers=num_workers, view=view, sampler=sampler)
    return [[(inputs, labels) for inputs, labels in batches] for _ in range(number)]


def test_the_clean_view_is_what_a_part_gives():
    part = augmented_part()
    assert part[0][0] == 0
    assert not any(inputs.any() for inputs, _ in ordered_batches(part, batch_size=3))
    assert not any(inputs.any() for epoch in epochs(part, 0, view="clean") for inputs, _ in epoch)
    with pytest.raises(UserError, match="a part has 3 inputs, but 2 augmented ones; give as many of each"):
        Part(torch.zeros(3, 1), [0, 1, 2], augmented=torch.zeros(2, 1))
    with pytest.raises(UserError, match="view must be 'training' or 'clean', got 'dirty'"):
        training_batches(part, batch_size=3, view="dirty")


@pytest.mark.parametrize("sampler", [None, lambda labels: [0, 0, 1, 2, 3]])
def test_augmented_batches_are_the_same_for_any_number_of_workers(sampler):
    alone = epochs(augmented_part(), 0, sampler=sampler)
    for num_workers in (1, 2):
        for one, other in zip(alone, epochs(augmented_part(), num_workers, sampler=sampler), strict=True):
            for (inputs, labels), (same_inputs, same_labels) in zip(one, other, strict=True):
                assert torch.equal(inputs, same_inputs) and torch.equal(labels, same_labels)
    noise = torch.cat([inputs for epoch in alone for inputs, _ in epoch])
    assert len(noise.unique()) == len(noise)  # also of an item that is drawn twice, and in the next epoch
    assert not torch.equal(alone[0][0][0], epochs(augmented_part(), 0, sampler=sampler, seed=1)[0][0][0])


def test_augmentation_leaves_the_global_generators_as_they_were():
    batches = iter(training_batches(augmented_part(), batch_size=3))
    next(batches)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    next(batches)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn


def test_joined_and_selected_items_keep_their_training_view():
    part = augmented_part()
    plain = Part(torch.zeros(2, 1), [7, 8])
    joined = join_parts([part, plain])
    assert [joined.augmented[index].item() > 0 for index in range(9)] == [True] * 7 + [False] * 2
    assert join_parts([plain, plain]).augmented is None
    split = Split("a", joined, plain, plain)
    selected = select_subset([split], labels=[6, 7]).part
    assert [value.item() > 0 for value in (selected.augmented[0], selected.augmented[1])] == [True, False]


class Recorder(Method):
    """Records what a model is trained on, and what the method consolidates on."""

    def __init__(self, model):
        super().__init__(model)
        self.trained, self.consolidated = [], []

    def extend_batch(self, inputs, labels):
        self.trained.append(inputs.detach().clone())
        return inputs, labels

    def consolidate(self, batches):
        self.consolidated.append(torch.cat([inputs for inputs, _ in batches]))


class Watched(RetrievalEvaluator):
    """An evaluator that records what it embeds."""

    seen: list

    def _embed(self, model, part):
        self.seen.append(torch.cat([inputs for inputs, _ in ordered_batches(part, batch_size=5)]))
        return super()._embed(model, part)


def run(splits, num_workers=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    method, evaluator = Recorder(model), Watched(recall_at=(1,))
    evaluator.seen = []
    recipe = Recipe(epochs=2, batch_size=5, num_workers=num_workers)
    train_sequence(model, splits, method=method, loss=pull_together, evaluator=evaluator, recipe=recipe)
    return model, method, evaluator


def rows(tensor):
    return {tuple(row.flatten().tolist()) for row in tensor}


def test_augmentation_never_meets_measurement():
    splits = transform_splits(sequence(), augment=[CROP, v2.RandomHorizontalFlip()])
    _, method, evaluator = run(splits)
    clean = [rows(split.train.inputs) for split in splits]
    assert [rows(inputs) for inputs in method.consolidated] == clean
    assert (
        len(rows(torch.cat(method.trained)) - clean[0] - clean[1]) > 24
    )  # nearly every one is changed, differently each time
    held_out = [rows(split.query.inputs) for split in splits]
    # Compensations are fitted on the training items of the second split
    assert set().union(*map(rows, evaluator.seen)) == set().union(clean[1], *held_out)


def test_a_training_is_the_same_for_any_number_of_workers():
    splits = transform_splits(sequence(), augment=[CROP, v2.ColorJitter(brightness=0.3)], normalize="data")
    (one, first, _), (other, second, _) = run(splits), run(splits, num_workers=2)
    assert torch.equal(torch.cat(first.trained), torch.cat(second.trained))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_nothing_to_do_leaves_the_splits_as_they_are():
    splits = sequence()
    assert transform_splits(splits) is splits


@pytest.mark.parametrize("is_tensor", [True, False])
def test_colours_are_normalized_by_the_first_training_data(is_tensor):
    splits = sequence()
    pixels = splits[0].train.inputs.double()
    if not is_tensor:
        parts = [Part(list(split.train.inputs), split.train.labels) for split in splits]
        splits = [
            Split(split.name, part, split.query, split.gallery) for split, part in zip(splits, parts, strict=True)
        ]
    done = transform_splits(SplitSequence(splits, label_names={"cat": [0]}), normalize="data")
    assert done.label_names == {"cat": [0]}
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    for split, old in zip(done, splits, strict=True):
        for part, raw in ((split.train, old.train), (split.query, old.query)):
            expected = (torch.stack([raw.inputs[i] for i in range(12)]) - mean[:, None, None]) / std[:, None, None]
            found = torch.stack([part.inputs[i] for i in range(12)])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected)
        assert split.query is split.gallery


def test_augmented_images_are_normalized_too():
    half = Preprocessing((0.5,) * 3, (0.25,) * 3)
    plain = transform_splits(sequence(), augment=[v2.RandomHorizontalFlip(p=1)])
    done = transform_splits(sequence(), augment=[v2.RandomHorizontalFlip(p=1)], normalize=half)
    torch.testing.assert_close(done[0].train.augmented[3], (plain[0].train.augmented[3] - 0.5) / 0.25)
    assert torch.equal(plain[0].train.augmented[3], images(0)[3].flip(2))
    assert done[0].query.augmented is None and isinstance(done[0].train.augmented, NormalizedImages)


def test_a_training_view_of_the_data_set_is_augmented_further():
    part = sequence()[0].train
    brighter = Part(part.inputs, part.labels, augmented=part.inputs + 1)
    done = transform_splits([Split("a", brighter, part, part)], augment=[v2.RandomVerticalFlip(p=1)])
    assert torch.equal(done[0].train.augmented[2], part.inputs[2].flip(1) + 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"must have the shape \[3, 6, 6\] of the others, got \[3, 4, 4\]; crop them"):
        transform_splits(sequence(), augment=[v2.RandomCrop(4)])[0].train.augmented[0]
    with pytest.raises(UserError, match=r"RandomCrop fails on an image of shape \[3, 6, 6\]"):
        transform_splits(sequence(), augment=[v2.RandomCrop(20)])[0].train.augmented[0]
    with pytest.raises(UserError, match="normalized in 1 channels, but the images have 3"):
        transform_splits(sequence(), normalize=Preprocessing((0.5,), (0.5,)))
    texts = Part(["a", "b"], [0, 1])
    with pytest.raises(UserError, match=r"take images, floating-point tensors \[C, H, W\] .*; the data set has a str"):
        transform_splits([Split("a", texts, texts, texts)], normalize="data")
    black = Part(torch.zeros(2, 1, 3, 3), [0, 1])
    with pytest.raises(UserError, match="channel 0 has one value in all training images of the first split"):
        transform_splits([Split("a", black, black, black)], normalize="data")


def test_transforms_enter_the_fingerprint_of_data():
    def fingerprint(**options):
        return fingerprint_of_split(transform_splits(sequence(), **options)[0])

    plain, cropped = fingerprint(), fingerprint(augment=[CROP])
    assert cropped == fingerprint(augment=[v2.RandomCrop(6, padding=2)])
    others = [fingerprint(augment=[v2.RandomCrop(6, padding=1)]), fingerprint(normalize="data")]
    both = fingerprint(augment=[CROP], normalize="data")
    assert len({plain, cropped, *others, both}) == 5
    joined = join_splits(transform_splits(sequence(), augment=[CROP]))
    assert fingerprint_of_split(joined) != fingerprint_of_split(join_splits(sequence()))


def test_the_digits_have_colours_around_zero():
    done = transform_splits(digits(num_splits=2), normalize="data")
    assert isinstance(done[0].train.inputs, torch.Tensor)
    assert abs(float(done[0].train.inputs.mean())) < 1e-5
    assert float(done[0].train.inputs.std(correction=0)) == pytest.approx(1)
