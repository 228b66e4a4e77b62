"""Protects the models of a pytorch-metric-learning trainer: the same training with and without MAS.

    python examples/metric_learning_trainer.py

Two splits of handwritten digits (0 and 1, then 2 and 3) are learned one after another by `MetricLossOnly`. The trainer is
an ordinary one; three marked lines add MAS. In the end, retrieval on the first split shows what was kept.
"""

import logging

import numpy as np
import torch
from pytorch_metric_learning import losses, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.utils.data import DataLoader, TensorDataset

import mas_embed as me
from mas_embed.integrations.metric_learning import WithPenalty, joined, next_split, score_hook

EPOCHS = 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on which trainer and tester put their batches


def make_models() -> dict[str, torch.nn.Module]:
    """A trunk and an embedder, as the trainers expect them."""
    with me.seeded(0):
        trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(64), torch.nn.ReLU())
        trunk(me.digits()[0].train.inputs[:1])
        return {"trunk": trunk.to(DEVICE), "embedder": torch.nn.Linear(64, 16).to(DEVICE)}


def train(strength: float) -> me.ScoreMatrix:
    """Trains on two splits; returns the mean average precision on both after each of them."""
    splits = me.digits(num_splits=5)[:2]
    train_sets = [TensorDataset(split.train.inputs, split.train.labels) for split in splits]
    query_sets = {split.name: TensorDataset(split.query.inputs, split.query.labels) for split in splits}
    models = make_models()
    mas = me.MAS(joined(models), strength=strength)  # line 1: the model is embedder(trunk(inputs))
    trainer = trainers.MetricLossOnly(
        models=models,
        optimizers={
            f"{name}_optimizer": torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()
        },
        batch_size=32,
        loss_funcs={"metric_loss": WithPenalty(losses.TripletMarginLoss(margin=0.2), mas)},  # line 2
        dataset=train_sets[0],
        dataloader_num_workers=0,
    )
    calculator = AccuracyCalculator(include=("mean_average_precision",))
    tester = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=0, accuracy_calculator=calculator)
    scores = me.ScoreMatrix(np.full((2, 2), np.nan))
    one_gallery = [
        (name, list(query_sets)) for name in query_sets
    ]  # of both splits' items, for the queries of each split
    start = 1
    with me.seeded(0):
        for split_index, train_set in enumerate(train_sets):
            if split_index > 0:
                start = next_split(trainer, train_set)  # a fresh iterator and fresh momentum; the epochs go on
            trainer.train(start, start + EPOCHS - 1)
            mas.consolidate(DataLoader(train_set, batch_size=64))  # line 3: when a split ends
            score_hook(scores, split_index, query_sets, tester, splits_to_eval=one_gallery)(trainer)
    return scores


if __name__ == "__main__":
    logging.getLogger("PML").setLevel(logging.WARNING)
    for name, strength in (("without protection", 0.0), ("with MAS", 300.0)):
        scores = train(strength)
        print(f"mAP on the first split after the second, {name}: {scores[1, 0]:.3f} (before: {scores[0, 0]:.3f})")
