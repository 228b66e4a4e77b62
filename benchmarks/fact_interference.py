"""What the score over all facts and images suffers from, read from the last checkpoints of a run of facts.

    python benchmarks/fact_interference.py runs/facts_nlvr_semantic

Prints for every method and seed as JSON lines, and as a table (Markdown) the means over the seeds:

- `by split`: mean over the splits of mAP, every split's facts among its own images; `all`: among all images;
- `extending`: all, where images of facts that extend a fact count as its own;
- `cosine`: all, by the cosine over the slots that a fact fills, which no scale of the outputs can change;
- `all slots`: all, by the distance over the wildcards too;
- `less nearest`: all, by the distance over all slots less its mean to the five nearest facts of the image;
- `moved`: all, every split's images moved by one vector, such that their mean is that of their facts (needs labels: what
  a shift of whole splits costs, no remedy);
- `at home`: share of the images of every split whose nearest fact is one of their own split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mas_embed.config.schema import load_config
from mas_embed.data import FactSequence, FactTable
from mas_embed.experiment.runner import make_model, make_splits
from mas_embed.runtime.atomic_files import read_tensors
from mas_embed.report import Table
from mas_embed.retrieval import embed, evaluate_retrieval
from mas_embed.facts.measures import evaluate_fact_retrieval
from mas_embed.training.loading import ordered_batches

COLUMNS = ("by split", "all", "extending", "cosine", "all slots", "less nearest", "moved")


def main() -> None:
    """Reads the run and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    config = load_config(run / "config.yaml")
    splits = make_splits(config)
    rows = []
    for method in config.methods:
        found = []
        for seed in config.seeds:
            tensors, _ = read_tensors(run / method.title / f"seed{seed}" / "checkpoint.safetensors")
            model = make_model(config, splits, seed=seed)
            model.load_state_dict(
                {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
            )
            found.append(
                diagnose([embed(model, ordered_batches(split.gallery, batch_size=256)) for split in splits], splits)
            )
            print(json.dumps({"benchmark": "fact_interference", "method": method.title, "seed": seed, **found[-1]}))
        means = torch.tensor([[values[name] for name in COLUMNS] for values in found]).mean(0)
        at_home = torch.tensor([values["at home"] for values in found]).mean(0)
        rows.append([method.title, *(f"{value:.3f}" for value in means), " ".join(f"{share:.2f}" for share in at_home)])
    print("\n" + Table("", ["method", *COLUMNS, "at home"], rows).to_markdown())


def diagnose(embeddings: list[Tensor], splits: FactSequence) -> dict[str, float | list[float]]:
    """The scores of one model, by the names of the columns; embeddings by split."""
    facts, labels = splits.facts, [split.gallery.labels for split in splits]
    images, together = torch.cat(embeddings), torch.cat(labels)
    moved = [own - own.mean(0) + facts.targets[wanted].mean(0) for own, wanted in zip(embeddings, labels, strict=True)]
    by_split = [precision(own, wanted, facts) for own, wanted in zip(embeddings, labels, strict=True)]
    extending = evaluate_fact_retrieval(images, together, facts.vectors, facts.weights, match="extending")
    distances = torch.cdist(facts.targets, images)
    return {
        "by split": sum(by_split) / len(by_split),
        "all": precision(images, together, facts),
        "extending": extending.mean_average_precision,
        "cosine": cosine_precision(images, together, facts),
        "all slots": ranked_precision(-distances, together),
        "less nearest": ranked_precision(distances.sort(0).values[:5].mean(0) - distances, together),
        "moved": precision(torch.cat(moved), together, facts),
        "at home": [share_at_home(own, wanted, facts) for own, wanted in zip(embeddings, labels, strict=True)],
    }


def precision(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """Mean average precision of the facts of some images."""
    return evaluate_fact_retrieval(images, labels, facts.vectors, facts.weights, facts=labels).mean_average_precision


def cosine_precision(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """The same by the cosine over the slots that a fact fills."""
    values = []
    for fact in labels.unique().tolist():
        slots = (facts.weights[fact] > 0).repeat_interleave(facts.vectors.shape[2])
        query, gallery = facts.targets[fact, slots][None], images[:, slots]
        values.append(evaluate_retrieval(query, torch.tensor([1]), gallery, (labels == fact).long(), distance="cosine"))
    return sum(scores.mean_average_precision for scores in values) / len(values)


def ranked_precision(scores: Tensor, labels: Tensor) -> float:
    """The same by any scores of images for facts [F, N], higher is nearer."""
    from sklearn.metrics import average_precision_score

    values = [average_precision_score((labels == fact).numpy(), scores[fact].numpy()) for fact in labels.unique()]
    return float(sum(values) / len(values))


def share_at_home(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """How many images of a split have one of its facts as their nearest, over all slots."""
    nearest = torch.cdist(images, facts.targets).argmin(1)
    return float(torch.isin(nearest, labels.unique()).double().mean())


if __name__ == "__main__":
    main()
