"""Methods on batches of texts, which `embed` receives as they are."""

import copy

import pytest
import torch
from torch import nn

from mas_embed import EWC, IMM, MAS, SI, Combine, LocalMAS, LwF, UserError
from mas_embed.methods import ClassStatistics

WORDS = ("red", "green", "blue", "cat", "dog")
TEXTS = ["red cat", "green dog", "blue cat cat", "dog", "blue dog red", "green"]
LABELS = torch.arange(6) % 2


def counts(texts):
    """The bag of words of every text, [N, 5]."""
    assert isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return torch.tensor([[float(text.split().count(word)) for word in WORDS] for text in texts])


def embed(model, texts):
    return model(counts(texts))


def squared(embeddings, labels, mined=None):
    return embeddings.square().mean()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


METHODS = {
    "mas": lambda model, **options: MAS(model, **options),
    "local_mas": lambda model, **options: LocalMAS(model, **options),
    "ewc": lambda model, **options: EWC(model, loss=squared, **options),
    "imm": lambda model, **options: IMM(model, mode="mode", loss=squared, **options),
    "lwf": lambda model, **options: LwF(model, **options),
    "class_statistics": lambda model, **options: ClassStatistics(model, layer="1", **options),
}


CASES = [(name, True) for name in METHODS] + [(name, False) for name in ("mas", "local_mas", "lwf")]


@pytest.mark.parametrize(("name", "labeled"), CASES)
def test_texts_with_embed_equal_tensors_without(name, labeled):
    states = []
    for options, inputs in (({"embed": embed}, TEXTS), ({}, counts(TEXTS))):
        method = METHODS[name](network(), **options)
        halves = [(inputs[:4], LABELS[:4]), (inputs[4:], LABELS[4:])]
        method.consolidate(halves if labeled else [texts for texts, _ in halves])
        extended, labels = method.extend_batch(inputs, LABELS)
        embeddings = embed(method.model, extended) if options else method.model(extended)
        penalty = method.batch_penalty(extended, embeddings)
        rows, labels = method.extend_embeddings(embeddings, labels)
        states.append((copy.deepcopy(method._state()), penalty, rows, labels))
    torch.testing.assert_close(states[0], states[1])


def test_si_does_not_read_the_batches():
    model = network()
    si = SI(model)
    embed(model, TEXTS).sum().backward()
    si.add_penalty_grad()
    si.after_step(torch.optim.SGD(model.parameters()))
    si.consolidate([TEXTS])
    assert si.num_splits == 1


def test_a_combination_passes_texts_on():
    model = network()
    combined = Combine(model, methods=[MAS(model, embed=embed), LwF(model, embed=embed)])
    combined.consolidate(iter([TEXTS[:3], TEXTS[3:]]))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    assert combined.penalty().item() > 0
    assert combined.batch_penalty(TEXTS, embed(model, TEXTS)).item() > 0


def test_class_statistics_refuse_texts_in_a_sentence():
    with pytest.raises(UserError, match="needs a floating-point tensor"):
        ClassStatistics(network()).consolidate([(TEXTS, LABELS)])
