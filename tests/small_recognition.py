"""A sequence of three splits of two or three classes: points around their class's place, for a linear trunk."""

import torch
from torch import nn

from mas_embed import Part, Recipe, Split, train_sequence
from mas_embed.data import SplitSequence
from mas_embed.recognition import ClassHeads, MultiHeadCrossEntropy, MultiHeadNet, RecognitionEvaluator

CLASSES = [2, 3, 2]


def small_splits(per_class=12, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(sum(CLASSES), 4, generator=generator)
    splits, first = [], 0

    def part(labels):
        return Part(centres[labels] + noise * torch.randn(len(labels), 4, generator=generator), labels)

    for index, number in enumerate(CLASSES):
        labels = (first + torch.arange(number)).repeat_interleave(per_class)
        held_out = part(labels)
        splits.append(Split(f"s{index}", part(labels), held_out, held_out))
        first += number
    return SplitSequence(splits, provides={"classes_per_split": CLASSES})


def small_net(seed=0, hidden=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(4, hidden), nn.ReLU())
        return MultiHeadNet(trunk, ClassHeads(nn.Linear(hidden, number) for number in CLASSES))


def learn(make_method, *, model=None, optimizer=None, epochs=10, splits=None, **options):
    """The model and the result of training the small sequence."""
    model = model or small_net()
    optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    result = train_sequence(
        model,
        splits or small_splits(),
        method=make_method(model),
        loss=MultiHeadCrossEntropy(CLASSES),
        recipe=Recipe(epochs=epochs, batch_size=8, optimizer=optimizer),
        evaluator=RecognitionEvaluator(CLASSES, batch_size=7),
        **options,
    )
    return model, result
