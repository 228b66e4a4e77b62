from collections import Counter

import pytest
import torch
from torch import nn

from mas_embed import MAS, Combine, Replay, UserError

MODEL = nn.Linear(1, 1)


def batches(split_index, num_samples=10, batch_size=4):
    """Sample i of split k is the number 100 k + i, of class k."""
    numbers = 100.0 * split_index + torch.arange(num_samples)
    labels = torch.full((num_samples,), split_index)
    return list(zip(numbers.unsqueeze(1).split(batch_size), labels.split(batch_size), strict=True))


def filled(num_splits=3, **options):
    replay = Replay(MODEL, **options)
    for split_index in range(num_splits):
        replay.consolidate(batches(split_index))
    return replay


def test_inputs_labels_and_splits_are_stored_together():
    replay = filled(buffer_size=12)
    numbers = replay.inputs["inputs"][:, 0]
    assert len(numbers) == len(numbers.unique()) == 12
    assert torch.equal(numbers // 100, replay.labels.float())
    assert torch.equal(replay.labels, replay.splits)


def test_all_samples_are_stored_if_the_buffer_is_large_enough():
    assert sorted(filled(1, buffer_size=50).inputs["inputs"][:, 0].tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("buffer_size", "expected"), [(9, [3, 3, 3]), (11, [4, 4, 3]), (2, [1, 1, 0]), (100, [10] * 3)]
)
def test_a_balanced_buffer(buffer_size, expected):
    replay = filled(policy="balanced", buffer_size=buffer_size)
    assert torch.bincount(replay.splits, minlength=3).tolist() == expected


def test_a_reservoir_gives_every_sample_the_same_chance():
    """6 of 30 are stored, over 400 seeds: each 80 times, with a standard deviation of 8."""
    counts = Counter()
    for seed in range(400):
        counts.update(filled(buffer_size=6, seed=seed).inputs["inputs"][:, 0].tolist())
    assert len(counts) == 30
    assert all(abs(count - 80) < 40 for count in counts.values())
    by_split = [sum(count for number, count in counts.items() if number // 100 == index) for index in range(3)]
    assert all(abs(total - 800) < 120 for total in by_split)


def test_a_batch_is_extended_by_its_share_of_stored_samples():
    for share, num_added in ((0.5, 4), (0.75, 12), (0.2, 1), (0.0, 0)):
        replay = filled(buffer_size=20, share=share)
        inputs, labels = replay.extend_batch(torch.full((4, 1), -1.0), torch.full((4,), 7))
        assert inputs[:4].tolist() == [[-1.0]] * 4
        assert len(inputs) == len(labels) == 4 + num_added
        assert torch.equal(inputs[4:, 0] // 100, labels[4:].float())
        assert len(inputs[4:].unique()) == num_added


def test_a_small_buffer_adds_all_its_items_and_an_empty_one_adds_none():
    inputs, labels = torch.zeros(8, 1), torch.zeros(8, dtype=torch.long)
    assert len(filled(buffer_size=3).extend_batch(inputs, labels)[0]) == 11
    unchanged = Replay(MODEL).extend_batch(inputs, labels)
    assert unchanged[0] is inputs and unchanged[1] is labels


def test_draws_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        replay = filled(buffer_size=20, seed=seed)
        draws.append([replay.extend_batch(torch.zeros(4, 1), torch.zeros(4).long())[0].tolist() for _ in range(3)])
    assert draws[0] == draws[1] != draws[2]
    assert draws[0][0] != draws[0][1]
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_of_several_tensors():
    replay = Replay(MODEL)
    tokens = {"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2)}
    replay.consolidate([(tokens, torch.tensor([0, 1]))])
    inputs, labels = replay.extend_batch(tokens, torch.tensor([5, 5]))
    assert inputs["ids"].shape == (4, 2)
    assert inputs["ids"].dtype == torch.int64
    assert sorted(labels.tolist()) == [0, 1, 5, 5]
    resumed = Replay(MODEL)
    resumed.load_state_dict(replay.state_dict())
    assert torch.equal(resumed.inputs["ids"], replay.inputs["ids"])


def test_memory_and_the_mark_of_stored_data():
    assert Replay.keeps == Combine(MODEL, methods=[Replay(MODEL), MAS(MODEL)]).keeps == "data"
    assert MAS.keeps == Combine(MODEL, methods=[MAS(MODEL), MAS(MODEL)]).keeps == "nothing"
    # per sample a float32 input, two int64 numbers and a float64 key
    assert filled(buffer_size=12).num_bytes == 12 * (4 + 8 + 8 + 8)


def test_errors():
    for options, message in (
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"share": 1.0}, "share must be from 0 to below 1, got 1.0"),
        ({"policy": "fifo"}, "policy must be 'reservoir' or 'balanced', got 'fifo'"),
    ):
        with pytest.raises(UserError, match=message):
            Replay(MODEL, **options)
    for batch, message in (
        (torch.zeros(2, 1), r"replay stores samples with their labels and needs batches of \(inputs, labels\)"),
        (([1, 2], torch.zeros(2)), "the inputs hold a list; give tensors"),
        ((["a", "b"], torch.zeros(2)), "replay cannot mix texts with those stored"),
        ((torch.zeros(2, 3), torch.zeros(2)), r"cannot mix inputs of shape \[3\] with those stored"),
    ):
        with pytest.raises(UserError, match=message):
            filled().consolidate([batch])
