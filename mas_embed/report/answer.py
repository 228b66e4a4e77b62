"""The first sentences of a report: which method keeps most of what is forgotten without it, at what cost, and for which index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mas_embed.evaluation import Results
from mas_embed.report.comparison_figures import measured
from mas_embed.report.figures import references_of
from mas_embed.report.tables import metric_name, number

SMALL = 0.005  # a difference of scores that is next to nothing

Part = tuple[str, bool]  # text, and whether it is emphasized


@dataclass(frozen=True)
class Answer:
    """What a report says first.

    Attributes:
        headline: one sentence, in parts of which some are emphasized.
        sentences: what it costs, how far the best possible is, and the old index.
    """

    headline: list[Part]
    sentences: list[str]


def answer_of(results: Results, kinds: Sequence[Mapping[str, str]]) -> Answer:
    """The first sentences about a run.

    Args:
        results: with at least one run.
        kinds: of every run by the title of a method the name of its component ("mas"); a title that all lack is the name.
    """
    references = references_of(results)
    final = _means(results, "final_average")
    sequential = [method for method in results.methods if method not in references and np.isfinite(final[method])]
    if not sequential:
        return Answer([("No method was trained split by split, so nothing can be forgotten.", False)], [])
    names = {title: name for one in kinds for title, name in one.items()}
    baselines = [method for method in sequential if names.get(method, method) == "finetune"]
    others = [method for method in sequential if method not in baselines]
    best = max(others or sequential, key=lambda method: final[method])
    run = next((one for one in kinds if best in one), {})
    baseline = next((method for method in baselines if method in run), next(iter(baselines), None))
    headline = _headline(results, best, baseline)
    sentences = [
        _cost(results, best, baseline),
        _without_data(results, best, others),
        _reference(results, best, baseline, references),
        _index(results, best),
    ]
    return Answer(headline, [sentence for sentence in sentences if sentence])


def _headline(results: Results, best: str, baseline: str | None) -> list[Part]:
    metric, final, forgetting = (
        metric_name(results.primary_metric),
        _means(results, "final_average"),
        _means(results, "forgetting"),
    )
    end = number(final[best], 2)
    if baseline is None or baseline == best:
        lost = forgetting[best]
        fall = f"; each split has lost {number(lost, 2)} since its best" if lost > SMALL else ""
        kind = "ends highest, at" if len(results.methods) > 1 else "ends at"
        return [(best, True), (f" {kind} a mean {metric} of {end} over the splits{fall}.", False)]
    start = number(final[baseline], 2)
    if final[best] - final[baseline] < SMALL:
        text = f"No method ends clearly above {baseline}, whose mean {metric} is {start}: "
        return [(text, False), (best, True), (f" comes closest with {end}.", False)]
    without, with_best = forgetting[baseline], forgetting[best]
    if without <= SMALL or not np.isfinite(with_best):
        return [
            (best, True),
            (f" ends at a mean {metric} of {end}; {baseline}, which forgets hardly anything, at {start}.", False),
        ]
    if with_best >= without:
        text = f" ends highest, at a mean {metric} of {end} instead of {start}, but forgets no less than {baseline}."
        return [(best, True), (text, False)]
    share = f"{100 * min(1.0, 1 - with_best / without):.0f} %"
    text = (
        f" of what {baseline} forgets: a split loses {number(max(with_best, 0), 2)} instead of {number(without, 2)}, "
        f"and the mean {metric} in the end is {end} instead of {start}."
    )
    return [(best, True), (" keeps ", False), (share, True), (text, False)]


def _cost(results: Results, best: str, baseline: str | None) -> str:
    """What the best method needs beside its training."""
    learning, runs = _means(results, "learning"), results.runs_of(best)
    parts = []
    if baseline is not None and baseline != best:
        seconds, without = _seconds(results, best), _seconds(results, baseline)
        if without > 0:
            times = seconds / without
            parts.append(
                f"as many seconds as {baseline}"
                if 0.95 <= times < 1.05
                else f"{times:.1f} times the seconds of {baseline} ({seconds:.0f} instead of {without:.0f})"
            )
        given_up = learning[baseline] - learning[best]
        if np.isfinite(given_up) and given_up > SMALL:
            parts.append(f"{number(given_up, 2)} less learning of a new split")
    num_bytes = max(run.num_bytes for run in runs)
    if num_bytes:
        parts.append(f"{size_of(num_bytes)} of memory")
    if runs[0].keeps != "nothing":
        parts.append(f"{runs[0].keeps} of earlier splits, which it keeps")
    return f"It costs {_listed(parts)}." if parts else ""


def _without_data(results: Results, best: str, others: list[str]) -> str:
    """The best of the methods that keep nothing, where the best of all keeps something."""
    final = _means(results, "final_average")
    keeping_nothing = [method for method in others if results.runs_of(method)[0].keeps == "nothing"]
    if best in keeping_nothing or not keeping_nothing:
        return ""
    name = max(keeping_nothing, key=lambda method: final[method])
    return f"Of the methods that keep no data, {name} ends highest, at {number(final[name], 2)}."


def _reference(results: Results, best: str, baseline: str | None, references: list[str]) -> str:
    """How much of the distance to training on everything at once the best method covers."""
    final = _means(results, "final_average")
    if not references:
        return ""
    top = max(references, key=lambda method: final[method])
    sentence = f"Trained on everything at once ({top}), the model reaches {number(final[top], 2)}"
    if baseline is None or baseline == best or not final[baseline] + SMALL <= final[best] <= final[top]:
        return f"{sentence}."
    share = (final[best] - final[baseline]) / (final[top] - final[baseline])
    return f"{sentence}; {best} covers {100 * share:.0f} % of the distance from {baseline}."


def _index(results: Results, best: str) -> str:
    """The verdicts on the index that was made before each update."""
    updates = [update for run in results.runs_of(best) for update in run.index_updates]
    if not updates:
        return ""
    verdicts = Counter(update.verdict for update in updates)
    meant = {
        "keep": "could stay as they are",
        "compensate": "could stay after a compensation",
        "re-embed": "had to be embedded again",
    }
    parts = [f"{meant[name]} {count} time{'s' * (count != 1)}" for name, count in verdicts.most_common()]
    counted = f"{len(updates)} update{'s' * (len(updates) != 1)}"
    return f"The old index: after {counted} of {best}, the stored vectors {_listed(parts)}."


def size_of(num_bytes: float) -> str:
    """A number of bytes as people write it.

    >>> size_of(300), size_of(311_000), size_of(52_000_000)
    ('300 bytes', '304 KiB', '50 MiB')
    """
    if num_bytes < 1024:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        if num_bytes < 1000 or unit == "GiB":
            return f"{num_bytes:.1f} {unit}" if num_bytes < 10 else f"{num_bytes:.0f} {unit}"
    raise AssertionError


def _means(results: Results, measure: str) -> dict[str, float]:
    return {
        name: float(np.mean(values)) if values else float("nan") for name, values in measured(results, measure).items()
    }


def _seconds(results: Results, method: str) -> float:
    return float(np.mean([run.seconds["training"] + run.seconds["importance"] for run in results.runs_of(method)]))


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
