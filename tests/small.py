"""A sequence so small that it trains in a blink: three splits of two classes, points around their class's place in the plane."""

import dataclasses

import torch
from torch import nn

from mas_embed import Callback, Finetune, Part, Recipe, RetrievalEvaluator, Split, train_sequence


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


def train(make_method=Finetune, model=None, splits=None, **options):
    """Trains the small sequence; options are those of the recipe (2 epochs, batches of 4) and of `train_sequence`."""
    model = model if model is not None else small_model()
    of_recipe = {field.name for field in dataclasses.fields(Recipe)} & options.keys()
    recipe = Recipe(**{"epochs": 2, "batch_size": 4, **{name: options.pop(name) for name in of_recipe}})
    defaults = {"loss": pull_together, "evaluator": RetrievalEvaluator(recall_at=(1,))}
    result = train_sequence(
        model, splits or small_splits(), method=make_method(model), recipe=recipe, **(defaults | options)
    )
    return model, result


class Recorder(Callback):
    """Collects every event, and stops training at the event for which `stop_at(event)` is true."""

    def __init__(self, stop_at=lambda event: False):
        self.events = []
        self._stop_at = stop_at

    def _record(self, event):
        self.events.append(event)
        if self._stop_at(event):
            raise Stopped

    on_epoch_end = on_split_end = on_run_end = _record


class Stopped(Exception):
    """Raised by a `Recorder`."""
