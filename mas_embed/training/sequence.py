"""The loop over splits, as the paper's algorithm has it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mas_embed.data import Split
from mas_embed.errors import UserError
from mas_embed.forgetting import ScoreMatrix
from mas_embed.methods import Method
from mas_embed.retrieval import Distance
from mas_embed.seeding import seeded
from mas_embed.training.checkpoint import load_checkpoint, save_checkpoint
from mas_embed.training.evaluation import Judgement, LabelJudge, MakeJudge, Row, check_splits
from mas_embed.training.loading import MakeSampler, training_batches, unlabeled_batches
from mas_embed.training.step import Loss, MakeOptimizer, MakeScheduler, Miner, OnEvent, Recipe, train_split


@dataclass
class SequenceResult:
    """What a model knew after every split.

    Attributes:
        scores: `ScoreMatrix` by metric: R[i, j] on split j after training through split i.
        initial: by metric the scores [S] of the untrained model.
        all: by metric the mean over the queries of all splits, after the last.
        scores_on_kept: `ScoreMatrix` by metric with a gallery that is never embedded again: an item keeps the vector that it
            had when its split was learned. Empty where no index is watched.
        indexes: after every split but the first, what training it did to the index of the splits before, see
            `IndexCompatibility.as_dict`.
        followed: by name the score after every split of what was followed beside the splits.
        num_steps: batches that were trained on.
        seconds: wall time of "training", "importance" (what the method does when a split ends) and "evaluation".
    """

    scores: dict[str, ScoreMatrix]
    initial: dict[str, list[float]]
    all: dict[str, float]
    scores_on_kept: dict[str, ScoreMatrix]
    indexes: list[dict[str, Any]]
    followed: dict[str, list[float]]
    num_steps: int
    seconds: dict[str, float]


@dataclass
class _Progress:
    """What has been recorded so far; goes into the checkpoint as it is."""

    rows: list[Row] = field(default_factory=list)
    kept_rows: list[Row] = field(default_factory=list)
    indexes: list[dict[str, Any]] = field(default_factory=list)
    followed: dict[str, list[float]] = field(default_factory=dict)
    initial: Row = field(default_factory=dict)
    all: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "importance": 0.0, "evaluation": 0.0})

    def add(self, judgement: Judgement) -> None:
        """Takes over what was found after a split."""
        self.rows.append(judgement.row)
        self.all = judgement.over_all
        if judgement.kept_row is not None:
            self.kept_rows.append(judgement.kept_row)
        if judgement.old_index is not None:
            self.indexes.append(judgement.old_index)
        for name, value in judgement.followed.items():
            self.followed.setdefault(name, []).append(value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def train_sequence(
    model: nn.Module,
    splits: Sequence[Split],
    *,
    method: Method,
    loss: Loss,
    miner: Miner | None = None,
    sampler: MakeSampler | None = None,
    optimizer: MakeOptimizer = torch.optim.Adam,
    scheduler: MakeScheduler | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    evaluate_on: Sequence[Split] | None = None,
    distance: Distance = "cosine",
    recall_at: Sequence[int] = (1, 2, 4, 8),
    watch_index: bool = True,
    judge: MakeJudge | None = None,
    importance_data: Any = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    on_event: OnEvent = lambda event: None,
) -> SequenceResult:
    """Trains a model on one split after another and measures after each what it knows of all.

    Beside the gallery that is embedded again after every split the result tells of one that is not, and after each split what
    became of the index of the splits before (`compare_indexes`), with compensations fitted on the new split's training inputs.

    Every split starts with a fresh optimizer and a fresh copy of the loss and the miner, so that no momentum, proxy or
    memory of the last split lives on. After a split the method consolidates on the split's training items, then the
    queries of every split are ranked against one gallery of all splits' held-out items. The same seed on the same
    machine gives the same scores.

    Args:
        model: embeds a batch of inputs as [N, D]; trained in place.
        splits: in the order in which they are learned.
        method: how old knowledge is kept; made with `model`.
        loss: `(embeddings [N, D], labels [N], mined) -> Tensor []`, such as a pytorch-metric-learning loss.
        miner: `(embeddings, labels) -> mined`, such as a pytorch-metric-learning miner.
        sampler: `labels [N] -> Sampler` of one epoch; None for every item once, shuffled.
        optimizer: `parameters -> Optimizer`; a model that has `parameter_groups(lr)` says how fast each of its parts learns.
        scheduler: `optimizer -> LRScheduler`, that steps after every epoch; None for one learning rate.
        epochs: passes over each split.
        batch_size: of training; evaluation takes four times as many, without gradients.
        evaluate_on: the splits that are judged, where they are not those that are trained (joint training).
        distance: by which held-out items are ranked.
        recall_at: the K of recall at K.
        watch_index: whether to follow the old index; not with `evaluate_on`, where splits are judged that are not trained.
        judge: `(model, splits, batch_size=...) -> Judge`, such as `partial(FactJudge, facts=...)`; None ranks held-out items
            by their labels, as the three options before say.
        importance_data: unlabeled inputs, anything with a length and items by position, that the method consolidates on after
            every split; None for the split's training items, with labels.
        seed: of batches, miners and whatever the model draws; mixed with the split's index.
        checkpoint: a file that is written after every split.
        resume: go on from `checkpoint` if it exists; the split in which training stopped starts again.
        accelerator: for devices, precision and several processes; by default what `accelerate` finds.
        on_event: is told `{"event": "epoch", ...}` and `{"event": "split", ...}` as they end.

    Raises:
        UserError: a split is empty or asks for a class that no gallery has; there is a checkpoint and `resume` is False, or
            it is one of another sequence; its folder does not exist.
        RunError: training diverged.
    """
    check_splits(splits)
    check_splits(evaluate_on or splits)
    accelerator = accelerator or Accelerator()
    recipe = Recipe(loss, miner, sampler, optimizer, scheduler, epochs, batch_size)
    if judge is None:
        watches_index = watch_index and evaluate_on is None
        judge = partial(LabelJudge, distance=distance, recall_at=recall_at, watches_index=watches_index)
    judging = judge(model, evaluate_on or splits, batch_size=4 * batch_size)
    plan = {
        "splits": [split.name for split in splits],
        "judged": [split.name for split in evaluate_on or splits],
        "method": type(method).__name__,
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        **judging.plan(),
    }
    prepared = accelerator.prepare_model(model)
    progress, judging.kept = _restore(checkpoint, resume, plan, model, method)
    if not progress.initial:
        with progress.timed("evaluation"):
            progress.initial, _ = judging.scores()
    for split_index in range(len(progress.rows), len(splits)):
        split, tell = splits[split_index], partial(_tell, on_event, progress, splits, split_index)
        with progress.timed("evaluation"):
            judging.begin_split(split)
        if method.is_learning:
            with seeded(seed, split_index):
                with progress.timed("training"):
                    train_split(prepared, split, recipe, method=method, accelerator=accelerator, on_event=tell)
                with progress.timed("importance"):
                    method.consolidate(_importance_batches(split, importance_data, batch_size))
        with progress.timed("evaluation"):
            judgement = judging.end_split(split)
        progress.add(judgement)
        if checkpoint is not None:
            save_checkpoint(Path(checkpoint), model, method, {"plan": plan, **vars(progress)}, judging.kept)
        tell({"event": "split", "scores": judgement.row})
    return _result(progress)


def _importance_batches(split: Split, unlabeled: Any, batch_size: int) -> Iterable[Any]:
    """What a method consolidates on: unlabeled inputs if there are any, else the split's training items with their labels."""
    if unlabeled is not None:
        return unlabeled_batches(unlabeled, batch_size=batch_size)
    # In random order: a loss over pairs says nothing about a batch of one class
    return training_batches(split.train, batch_size=batch_size, sampler=None)


def _tell(
    on_event: OnEvent, progress: _Progress, splits: Sequence[Split], split_index: int, event: Mapping[str, Any]
) -> None:
    progress.num_steps += event.get("num_batches", 0)
    place = {"split": splits[split_index].name, "split_index": split_index, "num_splits": len(splits)}
    on_event({**event, **place})


def _restore(
    checkpoint: str | Path | None, resume: bool, plan: Mapping[str, Any], model: nn.Module, method: Method
) -> tuple[_Progress, list[Tensor]]:
    if checkpoint is None:
        return _Progress(), []
    path = Path(checkpoint)
    if not path.parent.is_dir():
        raise UserError(f"the folder of the checkpoint, {path.parent}, does not exist")
    if not path.exists():
        return _Progress(), []
    if not resume:
        raise UserError(f"there is a checkpoint already at {path}; pass resume=True to go on from it, or another path")
    restored, kept = load_checkpoint(path, model, method, plan)
    return _Progress(**{name: value for name, value in restored.items() if name != "plan"}), kept


def _result(progress: _Progress) -> SequenceResult:
    return SequenceResult(
        _matrices(progress.rows),
        progress.initial,
        progress.all,
        _matrices(progress.kept_rows),
        progress.indexes,
        progress.followed,
        progress.num_steps,
        progress.seconds,
    )


def _matrices(rows: list[Row]) -> dict[str, ScoreMatrix]:
    return {name: ScoreMatrix([row[name] for row in rows]) for name in (rows[0] if rows else ())}
