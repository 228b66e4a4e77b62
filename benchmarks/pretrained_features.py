"""What the features of a pretrained network retrieve before anything is trained: the line that every method has to beat.

    python benchmarks/pretrained_features.py configs/grocery.yaml --set data.root=... --set model.weights=...

Takes a config whose model is a `backbone`, leaves out its head, and prints for the held-out images the mean average precision
and the recall at 1 of every split, their means, and those of all images together.
"""

from __future__ import annotations

import argparse
from statistics import mean

from mas_embed import RetrievalEvaluator, load_config
from mas_embed.evaluation import BEFORE_FIRST
from mas_embed.experiment import build_model, build_splits
from mas_embed.report import Table

METRICS = ("mean_average_precision", "recall_at_1")


def main() -> None:
    """Embeds and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="of the config, as in mas-embed run"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, [*arguments.overrides, "model.head=none"])
    splits = build_splits(config)
    evaluation = RetrievalEvaluator(follow_index=False).evaluate(
        build_model(config, splits, seed=0), splits, BEFORE_FIRST
    )
    rows = []
    for metric in METRICS:
        scores = evaluation.scores[metric]
        values = [*scores, mean(scores), evaluation.pooled[metric]]
        rows.append([metric, *(f"{value:.3f}".lstrip("0") for value in values)])
    print(Table("features", ["metric", *(split.name for split in splits), "mean", "all"], rows).to_markdown())


if __name__ == "__main__":
    main()
