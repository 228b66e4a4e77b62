"""Diagnoses why the pooled score of a fact experiment is low, from the last checkpoints of a run.

    python benchmarks/fact_interference.py runs/facts_nlvr_semantic

Prints one JSON line for every method and seed, then a Markdown table of the means over the seeds. All columns but the last
are mean average precision:

- `by split`: the facts of every split among its images, mean over the splits; `all`: all facts among all images;
- `extending`: all, where images of facts that extend the queried fact are relevant too;
- `cosine`: all, ranked by the cosine over the slots that a fact fills, which does not depend on the scale of the outputs;
- `all slots`: all, ranked by the distance over all slots, wildcards included;
- `less nearest`: all, ranked by the distance over all slots minus the image's mean distance to its five nearest facts;
- `moved`: all, after the images of every split are shifted by one vector so that their mean is the mean of their facts. This
  needs labels: it measures what the shift of whole splits costs and is not a remedy;
- `at home`: for every split the share of its images whose nearest fact is one of the split's facts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mas_embed.config import load_config
from mas_embed.data import ordered_batches
from mas_embed.experiment import build_model, build_splits, runs_of
from mas_embed.facts import FactSequence, FactTable, evaluate_fact_retrieval
from mas_embed.report import Table
from mas_embed.retrieval import embed, evaluate_retrieval
from mas_embed.runtime.atomic_files import read_tensors

COLUMNS = ("by split", "all", "extending", "cosine", "all slots", "less nearest", "moved")


def main() -> None:
    """Reads the run and prints its diagnosis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a finished run with a data set of facts")
    folder = parser.parse_args().run
    config = load_config(folder / "config.yaml")
    splits = build_splits(config)
    assert isinstance(splits, FactSequence), "the run has no facts"
    diagnoses: dict[str, list[dict[str, float | list[float]]]] = {method.title: [] for method in config.methods}
    for run in runs_of(config):
        model = build_model(config, splits, seed=run.seed)
        tensors, _ = read_tensors(folder / run.folder / "checkpoint.safetensors")
        prefix = "model/"
        model.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        embeddings = [embed(model, ordered_batches(split.gallery, batch_size=256)) for split in splits]
        found = diagnose(embeddings, splits)
        diagnoses[run.method.title].append(found)
        print(json.dumps({"benchmark": "fact_interference", "method": run.method.title, "seed": run.seed, **found}))
    rows = [as_row(method, found) for method, found in diagnoses.items()]
    print("\n" + Table("", ["method", *COLUMNS, "at home"], rows).to_markdown())


def as_row(method: str, diagnoses: list[dict[str, float | list[float]]]) -> list[str]:
    """The row of a method in the table: means over the seeds."""
    means = torch.tensor([[values[name] for name in COLUMNS] for values in diagnoses]).mean(0)
    at_home = torch.tensor([values["at home"] for values in diagnoses]).mean(0)
    return [method, *(f"{value:.3f}" for value in means), " ".join(f"{share:.2f}" for share in at_home)]


def diagnose(embeddings: list[Tensor], splits: FactSequence) -> dict[str, float | list[float]]:
    """The values of one model by column.

    Args:
        embeddings: of the gallery images, by split.
        splits: of the run.
    """
    facts, labels_by_split = splits.facts, [split.gallery.labels for split in splits]
    by_split = list(zip(embeddings, labels_by_split, strict=True))
    images, labels = torch.cat(embeddings), torch.cat(labels_by_split)
    precisions = [precision(split_images, split_labels, facts) for split_images, split_labels in by_split]
    moved = [
        split_images - split_images.mean(0) + facts.targets[split_labels].mean(0)
        for split_images, split_labels in by_split
    ]
    extending = evaluate_fact_retrieval(images, labels, facts.vectors, facts.weights, match="extending")
    distances = torch.cdist(facts.targets, images)
    return {
        "by split": sum(precisions) / len(precisions),
        "all": precision(images, labels, facts),
        "extending": extending.mean_average_precision,
        "cosine": cosine_precision(images, labels, facts),
        "all slots": ranked_precision(-distances, labels),
        "less nearest": ranked_precision(distances.sort(0).values[:5].mean(0) - distances, labels),
        "moved": precision(torch.cat(moved), labels, facts),
        "at home": [share_at_home(split_images, split_labels, facts) for split_images, split_labels in by_split],
    }


def precision(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """Mean average precision of the facts of the images."""
    return evaluate_fact_retrieval(images, labels, facts.vectors, facts.weights, facts=labels).mean_average_precision


def cosine_precision(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """Mean average precision of the facts of the images by the cosine over the slots that a fact fills."""
    values = []
    for fact in labels.unique().tolist():
        slots = (facts.weights[fact] > 0).repeat_interleave(facts.vectors.shape[2])
        query, gallery = facts.targets[fact, slots][None], images[:, slots]
        values.append(evaluate_retrieval(query, torch.tensor([1]), gallery, (labels == fact).long(), distance="cosine"))
    return sum(scores.mean_average_precision for scores in values) / len(values)


def ranked_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean average precision of the facts of the images by scores [F, N], where a higher score is nearer."""
    from sklearn.metrics import average_precision_score

    values = [average_precision_score((labels == fact).numpy(), scores[fact].numpy()) for fact in labels.unique()]
    return float(sum(values) / len(values))


def share_at_home(images: Tensor, labels: Tensor, facts: FactTable) -> float:
    """Share of the images of a split whose nearest fact, over all slots, is one of the split's facts."""
    nearest = torch.cdist(images, facts.targets).argmin(1)
    return float(torch.isin(nearest, labels.unique()).double().mean())


if __name__ == "__main__":
    main()
