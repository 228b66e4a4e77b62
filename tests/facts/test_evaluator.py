"""What a judge of facts says, on a model that embeds an image as itself."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mas_embed import Finetune, UserError, train_sequence
from mas_embed.data import FactSequence, FactTable, Part, Split, select_subset
from mas_embed.losses import FactLoss
from mas_embed.facts.measures import evaluate_fact_recognition, evaluate_fact_retrieval
from mas_embed.training import FACT_METRICS, FactJudge
from mas_embed.facts.evaluator import score_facts

WORDS = [("cat", "", ""), ("cat", "runs", ""), ("dog", "", ""), ("dog", "runs", ""), ("cow", "eats", "hay")]
NUMBERS = {"": 0.0, "cat": 1.0, "dog": -1.0, "cow": 3.0, "runs": 2.0, "eats": -2.0, "hay": 1.0}
SPLITS = {"cats": [0, 1], "others": [2, 3, 4]}


def sequence(noise=0.0, per_fact=3, seed=0):
    """Images that are the vectors of their facts, and noise."""
    vectors = torch.tensor([[[NUMBERS[word]] for word in words] for words in WORDS])
    weights = torch.tensor([[float(bool(word)) for word in words] for words in WORDS])
    facts = FactTable(torch.arange(len(WORDS)), WORDS, vectors, weights)
    generator = torch.Generator().manual_seed(seed)

    def part(rows):
        labels = torch.tensor(rows).repeat_interleave(per_fact)
        return Part(facts.targets[labels] + noise * torch.randn(len(labels), 3, generator=generator), labels)

    splits = [Split(name, part(rows), own := part(rows), own) for name, rows in SPLITS.items()]
    return FactSequence(splits, facts)


def judge_of(splits, **options):
    return FactJudge(nn.Identity(), splits, facts=splits.facts, batch_size=4, **options)


def test_a_split_asks_its_own_facts_of_its_own_images_and_all_asks_all():
    splits = sequence(noise=1.0)
    row, over_all = judge_of(splits).scores()
    table = splits.facts.vectors, splits.facts.weights
    for index, split in enumerate(splits):
        alone = evaluate_fact_retrieval(split.gallery.inputs, split.gallery.labels, *table, facts=split.gallery.labels)
        assert row["mean_average_precision"][index] == alone.mean_average_precision
        assert row["mean_average_precision_found_at_100"][index] == alone.mean_average_precision_found_at_100
    images = torch.cat([split.gallery.inputs for split in splits])
    labels = torch.cat([split.gallery.labels for split in splits])
    together = evaluate_fact_retrieval(images, labels, *table)
    assert over_all["mean_average_precision"] == together.mean_average_precision
    assert over_all["mean_average_precision_order_1"] == together.by_order[1]
    assert over_all["image_to_fact_k1"] == evaluate_fact_recognition(images, labels, *table).hits_at[1]
    assert over_all["mean_average_precision"] < np.mean(row["mean_average_precision"])


def test_orders_that_a_split_lacks_are_told_of_all_only():
    row, over_all = judge_of(sequence()).scores()
    assert row.keys() == {*FACT_METRICS, "mean_average_precision_order_1", "mean_average_precision_order_2"}
    assert over_all.keys() == row.keys() | {"mean_average_precision_order_3"}


def test_scores_by_hand():
    splits = sequence()
    # <cat> fits the images of <cat, runs> as well: six equal distances, three of them right
    scores = score_facts(splits[0].gallery.inputs, splits[0].gallery.labels, splits.facts)
    assert scores["mean_average_precision_order_1"] == 0.5
    assert scores["mean_average_precision_order_2"] == 1.0
    assert scores["mean_average_precision"] == 0.75
    assert scores["mean_average_precision_extending"] == 1.0
    # Irrelevant first: 1/4, 2/5, 3/6
    assert scores["mean_average_precision_found_at_100"] == pytest.approx((1 + (0.25 + 0.4 + 0.5) / 3) / 2)
    assert scores["image_to_fact_k1"] == scores["image_to_fact_mrr"] == 1.0


def test_what_is_followed_is_asked_of_the_images_of_its_splits():
    splits = sequence(noise=3.0, seed=1)
    followed = {"cat": select_subset(splits, split="cats", labels=[0]), "cat of all": select_subset(splits, labels=[0])}
    judgement = judge_of(splits, followed=followed).end_split(splits[0])
    table = splits.facts.vectors, splits.facts.weights
    images, labels = splits[0].gallery.inputs, splits[0].gallery.labels
    own = evaluate_fact_retrieval(images, labels, *table, facts=torch.tensor([0]))
    assert judgement.followed["cat"] == own.mean_average_precision
    images, labels = (torch.cat([getattr(split.gallery, name) for split in splits]) for name in ("inputs", "labels"))
    everywhere = evaluate_fact_retrieval(images, labels, *table, facts=torch.tensor([0]))
    assert judgement.followed["cat of all"] == everywhere.mean_average_precision < own.mean_average_precision


def test_labels_that_are_no_rows_and_followed_facts_that_nobody_shows():
    splits = sequence()
    with pytest.raises(
        UserError, match="split 'others' has labels from 2 to 4, which must be rows of the table of 3 facts"
    ):
        FactJudge(
            nn.Identity(), splits, facts=FactTable(*(value[:3] for value in vars(splits.facts).values())), batch_size=4
        )
    nothing = Part(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UserError, match="split 'none' has an empty gallery part"):
        judge_of(FactSequence([*splits, Split("none", splits[0].train, nothing, nothing)], splits.facts))
    empty = Part(splits[0].gallery.inputs[3:], splits[0].gallery.labels[3:])
    subset = select_subset(splits, split="cats")
    splits[0] = Split("cats", splits[0].train, empty, empty)
    with pytest.raises(UserError, match="'cats' cannot be followed: no held-out image shows <cat>"):
        judge_of(splits, followed={"cats": subset})


def train(splits, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    facts = splits.facts
    defaults = {
        "method": Finetune(model),
        "loss": FactLoss(facts.vectors, facts.weights),
        "epochs": 5,
        "batch_size": 4,
        "judge": partial(FactJudge, facts=facts, followed={"cats": select_subset(splits, split="cats")}),
    }
    return train_sequence(model, splits, **(defaults | options))


def test_a_sequence_of_facts_is_learned_and_followed():
    splits = sequence(noise=0.1, per_fact=12)
    result = train(splits, epochs=20, optimizer=partial(torch.optim.Adam, lr=0.03))
    matrix = result.scores["mean_average_precision"]
    assert matrix.scores.shape == (2, 2)
    assert matrix.learning > 0.85 > np.mean(result.initial["mean_average_precision"])
    assert result.followed["cats"] == matrix.scores[:, 0].tolist()  # what is followed is the first split
    assert (result.indexes, result.scores_on_kept) == ([], {})


def test_resumed_is_uninterrupted_and_judged_alike(tmp_path):
    splits, checkpoint = sequence(noise=0.5), tmp_path / "c.safetensors"
    expected = train(splits)

    def stop(event):
        if event["event"] == "split":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(splits, checkpoint=checkpoint, on_event=stop)
    with pytest.raises(UserError, match="its distance is cosine, not euclidean"):
        train(splits, checkpoint=checkpoint, resume=True,
              judge=partial(FactJudge, facts=splits.facts, distance="euclidean"))  # fmt: skip
    resumed = train(splits, checkpoint=checkpoint, resume=True)
    assert resumed.followed == expected.followed
    assert resumed.all == expected.all
    for name, matrix in expected.scores.items():
        np.testing.assert_array_equal(matrix.scores, resumed.scores[name].scores)
