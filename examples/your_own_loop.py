"""Protects a model in a plain PyTorch loop: the same training with and without MAS.

    python examples/your_own_loop.py

Two splits of handwritten digits (0 and 1, then 2 and 3) are learned one after another. The loop is ordinary PyTorch; three marked
lines add MAS. In the end, retrieval on the first split shows what was kept.
"""

import torch
from pytorch_metric_learning.losses import TripletMarginLoss

import mas_embed as me


def train(strength: float) -> float:
    """Trains on two splits; returns the mean average precision on the first split afterwards."""
    with me.seeded(0):
        model = me.small_conv(embedding_size=16)
    loss = TripletMarginLoss(margin=0.2)
    splits = me.digits(num_splits=5)[:2]
    generator = torch.Generator().manual_seed(0)
    protection = me.MAS(model, strength=strength, embed="unnormalized")  # line 1: before the first split
    for split in splits:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(20):  # epochs
            for batch in torch.randperm(len(split.train), generator=generator).split(64):
                optimizer.zero_grad()
                loss(model(split.train.inputs[batch]), split.train.labels[batch]).backward()
                protection.add_penalty_grad()  # line 2: after backward()
                optimizer.step()
        protection.consolidate(split.train.inputs.split(64))  # line 3: when a split ends; labels are not needed
    gallery = me.join_splits(splits).gallery
    queries = splits[0].query
    with torch.no_grad():
        scores = me.evaluate_retrieval(
            model(queries.inputs),
            queries.labels,
            model(gallery.inputs),
            gallery.labels,
            query_ids=queries.ids,
            gallery_ids=gallery.ids,
        )
    return scores.mean_average_precision


if __name__ == "__main__":
    print(f"mAP on the first split after the second, without protection: {train(strength=0):.3f}")
    print(f"mAP on the first split after the second, with MAS:           {train(strength=300):.3f}")
