"""Protects a model in PyTorch Lightning: one new Trainer for each split, the same training with and without MAS.

    python examples/lightning_splits.py

Two splits of handwritten digits (0 and 1, then 2 and 3) are learned one after another. The LightningModule is ordinary; the
callback adds MAS. In the end, retrieval on the first split shows what was kept.
"""

import logging
import warnings

import lightning as L
import torch
from pytorch_metric_learning.losses import TripletMarginLoss

import mas_embed as me
from mas_embed.integrations.lightning import MethodCallback, SplitsDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Lightning's own advice and use of a deprecated class
warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec.* is deprecated")


class Embedder(L.LightningModule):
    """A network that is trained with a triplet loss; nothing in it knows of MAS."""

    def __init__(self) -> None:
        super().__init__()
        self.net = me.small_conv(embedding_size=16)
        self.loss = TripletMarginLoss(margin=0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return self.loss(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(strength: float) -> me.ScoreMatrix:
    """Trains on two splits; returns the mean average precision on each split after each."""
    splits = me.digits(num_splits=5)[:2]
    evaluator = me.RetrievalEvaluator()
    with me.seeded(0):
        module = Embedder()
    callback = MethodCallback(me.MAS(module.net, strength=strength, embed="unnormalized"))
    scores = []
    for split_index in range(len(splits)):
        trainer = L.Trainer(
            max_epochs=20,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        evaluator.begin_split(module, splits, split_index)
        trainer.fit(module, datamodule=SplitsDataModule(splits, split_index=split_index))
        evaluation = evaluator.evaluate(module, splits, split_index)
        scores.append(evaluation.scores["mean_average_precision"])
    return me.ScoreMatrix(scores)


if __name__ == "__main__":
    for strength in (0, 300):
        scores = train(strength)
        print(
            f"strength {strength}: mAP on the first split {scores.scores[-1, 0]:.3f}, on the last {scores.scores[-1, 1]:.3f}"
        )
