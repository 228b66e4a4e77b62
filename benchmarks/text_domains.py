"""Intents of one domain after another (CLINC150 or HWU64), retrieved by a small transformer on word vectors.

    python benchmarks/text_domains.py --data text_intents.tar.xz --vectors glove.twitter.27B.25d.txt.gz

Writes a list of texts that the data set `text_manifest` reads, runs `configs/text_domains.yaml` with every seed, and prints as
Markdown: the summary, the mean average precision of every domain after every step, and what the index of the earlier domains
is still worth. `--dataset hwu64` takes the scenarios of HWU64 instead of the domains of CLINC150.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mas_embed import load_config, run_experiment
from mas_embed.evaluation import Results, RunRecord
from mas_embed.experiment import ExperimentCallback
from mas_embed.report import Table, cost_table, index_table, selection_table, summary_table
from mas_embed.runtime.environment import describe_environment

FOLDER = Path("runs/text_intents")  # holds what the config names
CONFIG = "configs/text_domains.yaml"
OVERRIDES = {"clinc150": [], "hwu64": ["name=text_scenarios", f"data.path={FOLDER / 'hwu64.csv'}"]}
MOST_TEXTS = {"train": 50, "validation": 10, "test": 10}  # of an intent, so that a seed takes minutes

Line = tuple[str, str, str, str]  # text, label, split, part


class PrintRuns(ExperimentCallback):
    """Prints a line for every training that has ended."""

    def on_run_recorded(self, record: RunRecord) -> None:
        final = record.matrix("mean_average_precision").final_average
        print(f"{record.method}  seed {record.seed}  {final:.3f}", flush=True)


def main() -> None:
    """Prepares the data, runs the config and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the archive with clinc150/ and hwu64/ as published")
    parser.add_argument("--vectors", type=Path, required=True, help="word vectors of GloVe or word2vec, .gz or not")
    parser.add_argument("--dataset", choices=list(OVERRIDES), default="clinc150")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--out", type=Path, help="the run directory; by default the one of the config's name in runs/")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="of the config, as in mas-embed run"
    )
    arguments = parser.parse_args()

    prepare(arguments.data, arguments.vectors)
    overrides = [*OVERRIDES[arguments.dataset], f"seeds={json.dumps(arguments.seeds)}", *arguments.overrides]
    config = load_config(CONFIG, overrides)
    results = run_experiment(config, arguments.out or Path("runs") / config.name, callbacks=[PrintRuns()])
    for make_table in (summary_table, index_table, cost_table, selection_table):
        if (table := make_table(results)) is not None:
            print(f"\n{table.to_markdown()}")
    for method in results.methods:
        print(f"\n{method}\n\n{steps_table(results, method).to_markdown()}")
    print(f"\n{json.dumps(describe_environment())}")


def prepare(archive: Path, vectors: Path) -> None:
    """Writes the lists of both data sets, and a copy of the word vectors, to `runs/text_intents`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(FOLDER / "published", filter="data")
    write_list(FOLDER / "clinc150.csv", clinc150(FOLDER / "published" / "clinc150" / "data"))
    write_list(FOLDER / "hwu64.csv", hwu64(FOLDER / "published" / "hwu64" / "HWU64"))
    shutil.copyfile(vectors, FOLDER / f"vectors.txt{'.gz' if vectors.suffix == '.gz' else ''}")


def clinc150(folder: Path) -> Iterator[Line]:
    """The texts of CLINC150 domain by domain, without those out of scope."""
    intents_by_domain = json.loads((folder / "domains.json").read_text())
    texts = json.loads((folder / "data_full.json").read_text())
    for domain, intents in intents_by_domain.items():
        for key, part in (("train", "train"), ("val", "validation"), ("test", "test")):
            for text, intent in texts[key]:
                if intent in intents:
                    yield text, intent, domain, part


def hwu64(folder: Path) -> Iterator[Line]:
    """The texts of HWU64 scenario by scenario; the scenario is the first word of an intent."""
    lines = []
    for key, part in (("train", "train"), ("valid", "validation"), ("test", "test")):
        texts, intents = ((folder / key / name).read_text().splitlines() for name in ("seq.in", "label"))
        lines += [(text, intent, intent.split("_")[0], part) for text, intent in zip(texts, intents, strict=True)]
    return iter(sorted(lines, key=lambda line: line[2]))  # stable: parts and texts stay in order


def write_list(path: Path, lines: Iterable[Line]) -> None:
    """Writes the first `MOST_TEXTS` of every intent and part."""
    counts: Counter[tuple[str, str]] = Counter()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split", "part"))
        for text, label, split, part in lines:
            counts[label, part] += 1
            if counts[label, part] <= MOST_TEXTS[part]:
                writer.writerow((text, label, split, part))


def steps_table(results: Results, method: str) -> Table:
    """The mean average precision of every split (column) after every step (row), as the mean over the seeds."""
    scores = results.matrices(method).mean(0)
    after = results.splits if len(scores) == len(results.splits) else ["all"]
    rows = [[name, *(f"{score:.2f}".lstrip("0") for score in row)] for name, row in zip(after, scores, strict=True)]
    return Table("steps", ["after", *results.splits], rows)


if __name__ == "__main__":
    main()
