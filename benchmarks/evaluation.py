"""What evaluation costs over a sequence of splits, beside the way in which it is usually written.

    python benchmarks/evaluation.py [--device cuda]

The model learns the five splits of the digits in turn; here every split only moves its weights a little, so that evaluation is
all that is measured: before the first split and after each, the scores of every split, the scores with the stale gallery, and
the comparison of the index across the update. "Once" is `RetrievalEvaluator`: every held-out item is embedded once per split,
all queries are ranked in one call. "Twice" embeds the gallery before a split as well as after it, item by item through a
`DataLoader`, and prepares and ranks the gallery anew for the queries of every split. Both give the same scores, which is
checked. "Recorded" is once, with what the report shows: neighbours of a sample of queries, each split's own gallery, and a map.
All take turns; seconds are medians. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import median_seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mas_embed import RetrievalEvaluator, Split, compare_indexes, digits, evaluate_retrieval, seeded, small_conv
from mas_embed.retrieval import embed
from mas_embed.runtime.environment import describe_environment

METRIC = "mean_average_precision"
BATCH_SIZE = 256
Step = Callable[[], None]


def recorded(model: nn.Module, splits: Sequence[Split], learn: Step, follow_index: bool) -> list[list[float]]:
    """The scores after every split, by the library's evaluator as it is by default."""
    return scores_by(RetrievalEvaluator(follow_index=follow_index, batch_size=BATCH_SIZE), model, splits, learn)


def once(model: nn.Module, splits: Sequence[Split], learn: Step, follow_index: bool) -> list[list[float]]:
    """The same without what is recorded for the report."""
    nothing: dict[str, Any] = {"recorded_queries": 0, "own_galleries": False}
    evaluator = RetrievalEvaluator(follow_index=follow_index, batch_size=BATCH_SIZE, **nothing)
    return scores_by(evaluator, model, splits, learn)


def scores_by(
    evaluator: RetrievalEvaluator, model: nn.Module, splits: Sequence[Split], learn: Step
) -> list[list[float]]:
    """The scores before the first split and after every one."""
    rows = [evaluator.evaluate(model, splits, -1).scores[METRIC]]
    for split_index in range(len(splits)):
        evaluator.begin_split(model, splits, split_index)
        learn()
        rows.append(evaluator.evaluate(model, splits, split_index).scores[METRIC])
    return rows


def twice(model: nn.Module, splits: Sequence[Split], learn: Step, follow_index: bool) -> list[list[float]]:
    """The same, with a pass before and after every split and a ranking for the queries of every split."""
    stale: list[Tensor] = []
    rows = [rank(splits, galleries_of(model, splits))]
    for split_index, split in enumerate(splits):
        compares = follow_index and split_index > 0
        before = galleries_of(model, splits) if compares else []
        train = embedded(model, split.train) if compares else torch.empty(0)
        learn()
        after = galleries_of(model, splits)
        rows.append(rank(splits, after))
        if follow_index:
            stale.append(after[split_index])
            rank(splits, [*stale, *after[len(stale) :]], after)
            if compares:
                compare(splits[:split_index], before, after, (train, embedded(model, split.train)))
    return rows


def embedded(model: nn.Module, part: Any) -> Tensor:
    return embed(model, DataLoader(part, batch_size=BATCH_SIZE))


def galleries_of(model: nn.Module, splits: Sequence[Split]) -> list[Tensor]:
    return [embedded(model, split.gallery) for split in splits]


def rank(splits: Sequence[Split], galleries: list[Tensor], queries: list[Tensor] | None = None) -> list[float]:
    """The score of every split; its queries are its gallery, as the digits have it."""
    gallery, labels, ids = torch.cat(galleries), *joined(splits)
    return [
        evaluate_retrieval(
            rows, split.query.labels, gallery, labels, query_ids=split.query.ids, gallery_ids=ids
        ).mean_average_precision
        for split, rows in zip(splits, queries or galleries, strict=True)
    ]


def compare(splits: Sequence[Split], before: list[Tensor], after: list[Tensor], fit_on: tuple[Tensor, Tensor]) -> None:
    old, new = (torch.cat(galleries[: len(splits)]) for galleries in (before, after))
    labels, ids = joined(splits)
    compare_indexes(old, new, old, new, labels, labels, query_ids=ids, gallery_ids=ids, fit_on=fit_on)


def joined(splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
    """Labels and ids of all galleries."""
    return torch.cat([split.gallery.labels for split in splits]), torch.cat([split.gallery.ids for split in splits])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    device, splits = torch.device(arguments.device), digits()
    with seeded(0):
        model = small_conv().to(device)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator(device=device)

    @torch.no_grad()
    def learn() -> None:
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, device=device)

    def run(evaluate: Callable[..., list[list[float]]], follow_index: bool) -> list[list[float]]:
        model.load_state_dict(start)
        generator.manual_seed(0)
        return evaluate(model, splits, learn, follow_index)

    print(
        "| evaluation of five splits of digits | ms, once | recorded | twice | once over twice | recorded over once |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for follow_index, title in ((False, "scores alone"), (True, "with the stale gallery and the index")):
        ways = {way.__name__: partial(run, way, follow_index) for way in (once, recorded, twice)}
        for name in ("recorded", "twice"):
            np.testing.assert_allclose(ways["once"](), ways[name](), rtol=1e-12)
        seconds = median_seconds(ways, arguments.rounds, device)
        milliseconds = " | ".join(f"{1000 * value:.0f}" for value in seconds.values())
        ratio, more = seconds["once"] / seconds["twice"], seconds["recorded"] / seconds["once"]
        print(f"| {title} | {milliseconds} | {ratio:.2f} | {more:.2f} |")
        line = {"benchmark": "evaluation", "what": title, **seconds, "ratio": ratio, "recorded_over_once": more}
        print(json.dumps({**line, "device": str(device)}))
    print(json.dumps(describe_environment()))


if __name__ == "__main__":
    main()
