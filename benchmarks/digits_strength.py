"""Chooses MAS's strength on the digits, on data that no reported figure uses: the validation part, with seeds of its own.

    python benchmarks/digits_strength.py

Prints a table (Markdown) and the same as JSON lines; the chosen strength of an output is the one with the highest final
average.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from mas_embed import load_config, run_experiment
from mas_embed.evaluation import RunRecord
from mas_embed.experiment import ExperimentCallback
from mas_embed.report import summary_table
from mas_embed.runtime.environment import describe_environment

OUTPUTS = {
    "projection": {"output": "projection"},
    "squared_norm before normalisation": {"output": "squared_norm", "embed": "unnormalized"},
}


class PrintRuns(ExperimentCallback):
    """Prints a line for every training that has ended."""

    def on_run_recorded(self, record: RunRecord) -> None:
        print(f"{record.method}  seed {record.seed}", flush=True)


def main() -> None:
    """Runs the search and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--strengths", type=float, nargs="+", default=[30, 100, 300, 1000, 3000])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 110)))
    arguments = parser.parse_args()
    methods = [
        {"name": "mas", "label": f"{title} {strength:g}", "strength": strength, **options}
        for title, options in OUTPUTS.items()
        for strength in arguments.strengths
    ]
    config = load_config(
        arguments.config,
        [
            "data.held_out=validation",
            f"seeds={json.dumps(arguments.seeds)}",
            f"methods={json.dumps([*methods, 'finetune'])}",
        ],
    )

    with tempfile.TemporaryDirectory() as folder:
        results = run_experiment(config, Path(folder) / "run", callbacks=[PrintRuns()])
    print(f"\n{summary_table(results).to_markdown()}\n")
    measures: dict[str, list[float]] = {}
    for run in results.runs:
        measures.setdefault(run.method, []).append(run.matrix(results.primary_metric).final_average)
    means = {method: sum(values) / len(values) for method, values in measures.items()}
    for title in OUTPUTS:
        chosen = max(arguments.strengths, key=lambda strength: means[f"{title} {strength:g}"])
        print(f"chosen for {title}: strength {chosen:g}")
    for method, mean in means.items():
        print(
            json.dumps(
                {"benchmark": "digits_strength", "method": method, "final_average": mean, "seeds": arguments.seeds}
            )
        )
    print(json.dumps(describe_environment()))


if __name__ == "__main__":
    main()
