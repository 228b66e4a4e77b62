"""Scores of the trained models of a run on changed data, such as other labels of the same images.

    python benchmarks/evaluate_run.py runs/grocery --set data.labels=coarse

Prints for every method the mean average precision of every split among the items of all splits, the mean over the splits, and
the score over all queries at once: mean and standard deviation over the seeds. Trains nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

from mas_embed import RetrievalEvaluator, load_config, load_run
from mas_embed.evaluation import read_results
from mas_embed.experiment import build_splits
from mas_embed.report import Table

METRIC = "mean_average_precision"


def main() -> None:
    """Evaluates and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the config of the run")
    arguments = parser.parse_args()
    splits = build_splits(load_config(arguments.run / "config.yaml", arguments.overrides))
    evaluator = RetrievalEvaluator(follow_index=False)
    rows = []
    for method, seeds in seeds_by_method(arguments.run).items():
        scores = []
        for seed in seeds:
            model = load_run(arguments.run, method=method, seed=seed).model.eval()
            evaluation = evaluator.evaluate(model, splits, len(splits) - 1)
            by_split = evaluation.scores[METRIC]
            scores.append([*by_split, mean(by_split), evaluation.pooled[METRIC]])
        rows.append([method, *map(mean_and_deviation, zip(*scores, strict=True))])
    print(Table(METRIC, ["method", *(split.name for split in splits), "mean", "all"], rows).to_markdown())


def seeds_by_method(run: Path) -> dict[str, list[int]]:
    """The seeds that every method of a run was trained with."""
    results = read_results(run)
    return {method: [record.seed for record in results.runs_of(method)] for method in results.methods}


def mean_and_deviation(values: tuple[float, ...]) -> str:
    """As in the tables of a report."""
    texts = [
        f"{value:.3f}".replace("0.", ".", 1) for value in (mean(values), stdev(values) if len(values) > 1 else 0.0)
    ]
    return " ± ".join(texts)


if __name__ == "__main__":
    main()
