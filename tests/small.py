"""A sequence so small that it trains in a blink: three splits of two classes, points around their class's place in the plane."""

import torch
from torch import nn

from mas_embed import Part, Split


def small_splits(num_splits=3, per_class=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def part(classes, offset):
        labels = torch.tensor(classes).repeat_interleave(per_class)
        angle = labels * (2 * torch.pi / (2 * num_splits))
        inputs = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(len(labels), 2, generator=generator)
        return Part(inputs, labels, torch.arange(len(labels)) + offset)

    splits = []
    for index in range(num_splits):
        classes = [2 * index, 2 * index + 1]
        held_out = part(classes, 1000 * (index + 1))
        splits.append(Split(f"s{index}", part(classes, 100_000 + 1000 * index), held_out, held_out))
    return splits


def small_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))


def pull_together(embeddings, labels, mined=None):
    """A loss without randomness: distances within classes, less those between."""
    same = labels[:, None] == labels
    distances = (embeddings[:, None] - embeddings).square().sum(2)
    return distances[same].mean() - 0.1 * distances[~same].clamp_max(4).sum() / len(labels) ** 2
