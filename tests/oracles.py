"""What the fast code is judged by, written in the dullest way; imports nothing of the package."""

import math

import torch


def per_sample_importance(model, samples, outputs_of, exponent=1, reduce="sum"):
    """Mean over samples of sum over outputs of |gradient|^exponent, one `autograd.grad` per sample and output.

    samples: batches of one; outputs_of(sample) -> list of scalars.
    """
    was_training = model.training
    model.eval()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    totals = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    for sample in samples:
        num_outputs = len(outputs_of(sample))
        for index in range(num_outputs):
            gradients = torch.autograd.grad(outputs_of(sample)[index], parameters, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    share = gradient.abs() ** exponent / len(samples)
                    totals[name] += share / num_outputs if reduce == "mean" else share
    model.train(was_training)
    return totals


def squared_norm(model):
    """The paper's output of a model, for `per_sample_importance`."""
    return lambda sample: [sum(value * value for value in model(sample)[0])]


def average_precision(scores, is_relevant):
    """AP with equal scores as one group, by two nested loops."""
    total, num_relevant = 0.0, 0
    for score, relevant in zip(scores, is_relevant, strict=True):
        if not relevant:
            continue
        num_relevant += 1
        at_least = [other_relevant for other, other_relevant in zip(scores, is_relevant, strict=True) if other >= score]
        total += sum(at_least) / len(at_least)
    return total / num_relevant if num_relevant else math.nan


def ranked_relevance(scores, is_relevant):
    """Relevance in the order of falling scores, irrelevant items first among equals."""
    pairs = sorted(zip(scores, is_relevant, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return [relevant for _, relevant in pairs]


def cut_measures(scores, is_relevant, ks):
    """precision@1, R-precision, AP@R, reciprocal rank and recall@K of one query, from a full sort."""
    ranked = ranked_relevance(scores, is_relevant)
    num_relevant = sum(ranked)
    at_r = sum(sum(ranked[: rank + 1]) / (rank + 1) for rank in range(num_relevant) if ranked[rank]) / num_relevant
    return {
        "precision_at_1": float(ranked[0]),
        "r_precision": sum(ranked[:num_relevant]) / num_relevant,
        "average_precision_at_r": at_r,
        "reciprocal_rank": 1 / (ranked.index(True) + 1),
        **{f"recall_at_{k}": float(any(ranked[:k])) for k in ks},
    }
