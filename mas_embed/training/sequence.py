"""The loop over splits."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from mas_embed.data import Split, check_splits, ordered_batches
from mas_embed.errors import UserError
from mas_embed.evaluation import BEFORE_FIRST, Evaluator, RetrievalEvaluator, begin_present, evaluate_present
from mas_embed.methods import Loss, Method
from mas_embed.runtime.distributed import check_same, process_rank, together
from mas_embed.runtime.forward import device_of, unwrap_compiled
from mas_embed.runtime.output_folder import locked
from mas_embed.runtime.seeding import seeded
from mas_embed.runtime.text import printable, shortened
from mas_embed.training.callbacks import Callback, Callbacks, Event, RunEnd, SplitEnd
from mas_embed.training.checkpoint import damage_explained, has_checkpoint, lock_of_checkpoint, save_checkpoint
from mas_embed.training.checkpointing import CheckpointEvery, SplitCheckpoints
from mas_embed.training.failures import evaluation_failures_explained, training_failures_explained
from mas_embed.training.loading import training_batches
from mas_embed.training.plan import make_plan, without_missing_files
from mas_embed.training.processes import (
    check_processes,
    check_same_data,
    check_same_weights,
    make_accelerator,
    prepare_model,
    share_of_batches,
)
from mas_embed.training.progress import Progress, restore
from mas_embed.training.recipe import Recipe
from mas_embed.training.result import SequenceResult
from mas_embed.training.step import Learner, Stopwatch, learn_split

Miner = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_MOVED = {
    **{name: f"recipe=Recipe({name}=...)" for name in ("epochs", "batch_size", "optimizer", "scheduler", "sampler")},
    **{name: f"evaluator=RetrievalEvaluator({name}=...)" for name in ("distance", "recall_at")},
    "watch_index": "evaluator=RetrievalEvaluator(follow_index=...)",
    "judge": "evaluator=..., an object that measures, such as RetrievalEvaluator()",
    "on_event": "callbacks=[...], objects of a subclass of Callback",
}


def _refuses_moved_arguments(function: Function) -> Function:
    """Refuses arguments that the function once had, with a sentence that names their new place."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in _MOVED:
                raise UserError(f"{function.__name__} has no argument '{name}' any more: pass {_MOVED[name]}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _closes_callbacks(function: Function) -> Function:
    """Closes the callbacks when the function has returned or failed."""

    @functools.wraps(function)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            given = kwargs.get("callbacks", ())
            for callback in given if isinstance(given, Sequence) else ():
                if isinstance(callback, Callback):
                    callback.close()

    return closing  # type: ignore[return-value]


@_refuses_moved_arguments
@_closes_callbacks
@together
def train_sequence(
    model: nn.Module,
    splits: Sequence[Split],
    *,
    method: Method,
    loss: Loss,
    miner: Miner | None = None,
    recipe: Recipe = Recipe(),
    evaluator: Evaluator | None = None,
    evaluate_on: Sequence[Split] | None = None,
    importance_data: Any = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: CheckpointEvery = CheckpointEvery(),
    accelerator: Accelerator | None = None,
    seed: int = 0,
) -> SequenceResult:
    """Trains a model on one split after another and measures after each what it knows of all.

    Every split starts with a fresh optimizer and a fresh copy of the loss and the miner, so that no momentum, proxy or
    memory of the last split lives on. After a split the method consolidates on the split's training items, then the
    evaluator measures the model. The same seed on the same machine gives the same scores; on a GPU, where torch's kernels may
    round differently from run to run, only with `torch.use_deterministic_algorithms(True)`.

    Several processes, as `accelerate launch` starts them, train one model as one process does, up to rounding: each embeds its
    share of every batch, and the miner and the loss see the whole batch. All of them call this function alike and get the same
    result; the callbacks of the first one are called, and it writes the checkpoint.

    Args:
        model: embeds a batch of inputs as [N, D]; trained in place.
        splits: in the order in which they are learned.
        method: how old knowledge is kept; made with `model`. One that has consolidated already, as on what a deployed model
            serves, protects the model in the first split, too.
        loss: `(embeddings [N, D], labels [N], mined) -> Tensor []`, such as a pytorch-metric-learning loss.
        miner: `(embeddings, labels) -> mined`, such as a pytorch-metric-learning miner.
        recipe: how every split is trained.
        evaluator: measures the model before the first split and after each; None for `RetrievalEvaluator()`.
        evaluate_on: the splits that are evaluated, where they are not those that are trained, as in joint training. After
            every split that is trained, all of them count as learned.
        importance_data: unlabeled inputs, anything with a length and items by position, that the method consolidates on after
            every split; None for the split's training items, with labels.
        callbacks: objects whose methods are called when a batch, an epoch, a split and the sequence end.
        checkpoint: a file that is written before the first split, after every split and, as `checkpoint_every` says, within
            one. The file before it is kept beside it. With a checkpoint, Ctrl-C and SIGTERM wait for the end of a step and
            write it, too; a second one does not wait.
        resume: go on from `checkpoint` if it exists, bit for bit as if training had not been interrupted (on a CPU with the
            same number of threads). There may be further splits after those of the checkpoint. The data of splits that were
            learned may be gone (`missing_split`): what is gone is not evaluated, and its scores are NaN.
        checkpoint_every: how often a checkpoint is written within a split, by default every 5 minutes.
        accelerator: for devices and precision; by default what `accelerate` finds.
        seed: of batches, miners and whatever the model draws; mixed with the split's index.

    Raises:
        UserError: a split is empty or the evaluator refuses it; the method was made with another model; there is a checkpoint
            and `resume` is False, or it is one of another sequence, or another process uses it; its folder does not exist;
            both the accelerator and the recipe accumulate gradients or set a precision; several processes could not train
            exactly as one does, or hold different data; an argument has moved, which the sentence names.
        RunError: training diverged, the memory or the disk is full, a process that loads batches was killed, or another process
            has ended.
    """
    evaluated_splits = splits if evaluate_on is None else evaluate_on
    path = None if checkpoint is None else Path(checkpoint)
    may_be_missing = resume and path is not None and has_checkpoint(path)
    check_splits(splits, may_be_missing=may_be_missing)
    check_splits(evaluated_splits, may_be_missing=may_be_missing)
    _check_components(model, method, loss, miner, recipe, evaluator, callbacks)
    evaluator = RetrievalEvaluator() if evaluator is None else evaluator
    accelerator = _accelerator(accelerator, recipe)
    learner = Learner(_prepared(model, method, recipe, accelerator), method, loss, miner, recipe, accelerator)
    plan: dict[str, Any] = {}
    if path is not None:
        plan = make_plan(learner, splits, evaluated_splits, importance_data=importance_data, seed=seed)
    check_same_data([*splits, *evaluated_splits], seed=seed)
    with _locked(path if process_rank() == 0 else None):
        resumed = restore(path, resume, plan, model, method, evaluator)
        check_same(len(resumed.progress.scores), "the checkpoints", "they must be one file that all processes can read")
        if may_be_missing:
            splits = without_missing_files(splits, len(resumed.progress.scores))
            _warn_of_missing(splits if evaluate_on is None else evaluate_on)
        sequence = _Sequence(
            model,
            learner,
            splits,
            evaluate_on,
            evaluator,
            Callbacks(tuple(callbacks) if process_rank() == 0 else ()),
            resumed.progress,
            importance_data,
            path,
            resumed.plan,
            checkpoint_every,
            seed,
        )
        sequence.begin(resumed.callbacks)
        for split_index in range(len(resumed.progress.scores), len(splits)):
            sequence.learn(split_index, resumed.take_within_split())
            sequence.evaluate(split_index)
        return sequence.end()


@dataclass
class _Sequence:
    """A sequence that is trained, in the steps of `train_sequence`."""

    model: nn.Module
    learner: Learner
    splits: Sequence[Split]
    evaluate_on: Sequence[Split] | None
    evaluator: Evaluator
    callbacks: Callbacks
    progress: Progress
    importance_data: Any
    path: Path | None
    plan: Mapping[str, Any]
    checkpoint_every: CheckpointEvery
    seed: int

    def __post_init__(self) -> None:
        self.method = self.learner.method
        self.evaluated_splits = self.splits if self.evaluate_on is None else self.evaluate_on
        self.stopwatch = Stopwatch(self.progress.seconds)

    def begin(self, states_of_callbacks: Mapping[str, Any] | None) -> None:
        """Takes the callbacks back to where they were, and evaluates the model before the first split."""
        if states_of_callbacks is not None:
            with damage_explained(f"the checkpoint {self.path}"):
                self.callbacks.load_state_dict(states_of_callbacks)
        if not self.progress.initial:
            with self.stopwatch.timed("evaluation"), evaluation_failures_explained(self.splits[0].name):
                self.progress.initial = self.evaluator.evaluate(self.model, self.evaluated_splits, BEFORE_FIRST).scores
            self._save()

    def learn(self, split_index: int, within_split: Mapping[str, Any] | None) -> None:
        """Learns a split, or the rest of it."""
        split = self.splits[split_index]
        if self.evaluate_on is None and within_split is None:
            with self.stopwatch.timed("evaluation"), evaluation_failures_explained(split.name):
                begin_present(self.evaluator, self.model, self.splits, split_index)
        if not self.method.is_learning:
            return
        consolidate_on = _consolidation_batches(split, self.importance_data, self.learner.recipe)
        if self.method.consolidates_shares:
            consolidate_on = share_of_batches(consolidate_on)
        save = None if self.path is None else self._save_within_split
        with seeded(self.seed, split_index), training_failures_explained(self.learner.recipe, split.name):
            self.progress.num_steps += learn_split(
                self.learner,
                split,
                consolidate_on=consolidate_on,
                callbacks=self.callbacks,
                event=self._event(split_index),
                stopwatch=self.stopwatch,
                checkpoints=SplitCheckpoints(save, self.checkpoint_every, within_split),
            )
        check_same_weights(self.model, split.name)

    def evaluate(self, split_index: int) -> None:
        """Measures the model after a split, and records it."""
        last_learned = split_index if self.evaluate_on is None else len(self.evaluated_splits) - 1
        name = self.splits[split_index].name
        with self.stopwatch.timed("evaluation"), evaluation_failures_explained(name):
            evaluation = evaluate_present(self.evaluator, self.model, self.evaluated_splits, last_learned)
        self.progress.record(evaluation)
        event = SplitEnd(**vars(self._event(split_index)), evaluation=evaluation)
        self.callbacks.with_state(True).on_split_end(event)
        self._save()
        self.callbacks.with_state(False).on_split_end(event)

    def end(self) -> SequenceResult:
        """The result, of which the callbacks are informed."""
        result = self.progress.as_result(self.evaluated_splits, method=self.method, seed=self.seed)
        self.callbacks.on_run_end(RunEnd(**vars(self._event(len(self.splits) - 1)), record=result))
        return result

    def _event(self, split_index: int) -> Event:
        return Event(self.method.name, self.seed, self.splits[split_index].name, split_index, len(self.splits))

    def _save_within_split(self, state: Mapping[str, Any]) -> None:
        self.stopwatch.lap("training")
        self._save(state)

    def _save(self, within_split: Mapping[str, Any] | None = None) -> None:
        if self.path is None or process_rank() > 0:
            return
        save_checkpoint(
            self.path,
            self.model,
            self.method,
            self.evaluator,
            {"plan": self.plan, **vars(self.progress)},
            callbacks=self.callbacks.state_dict(),
            within_split=within_split,
        )


@contextmanager
def _locked(checkpoint: Path | None) -> Iterator[None]:
    """Keeps other processes from the checkpoint.

    Raises:
        UserError: another process uses it already, or its folder does not exist.
    """
    if checkpoint is None:
        yield
        return
    if not checkpoint.parent.is_dir():
        raise UserError(f"the folder of the checkpoint, {checkpoint.parent}, does not exist")
    refusal = f"another process is training with the checkpoint {checkpoint}; wait for its end, or name another file"
    with locked(checkpoint.parent, name=lock_of_checkpoint(checkpoint).name, refusal=refusal):
        yield


def _check_components(
    model: nn.Module, method: object, loss: object, miner: object, recipe: object, evaluator: object, callbacks: object
) -> None:
    """Raises `UserError` for an argument of `train_sequence` that cannot be what it is for, or a method of another model."""
    accepted = {
        "method must be a Method, such as MAS(model)": isinstance(method, Method),
        "loss must be a function (embeddings, labels, mined) -> tensor": callable(loss),
        "miner must be a function (embeddings, labels) -> mined, or None": miner is None or callable(miner),
        "recipe must be a Recipe, such as Recipe(epochs=5)": isinstance(recipe, Recipe),
        "evaluator must have the methods of an Evaluator, or be None": evaluator is None
        or hasattr(evaluator, "evaluate"),
        "callbacks must be a list of Callback": isinstance(callbacks, Sequence)
        and all(isinstance(callback, Callback) for callback in callbacks),
    }
    for sentence, is_accepted in accepted.items():
        if not is_accepted:
            raise UserError(sentence)
    if isinstance(method, Method) and unwrap_compiled(method.model)[0] is not unwrap_compiled(model)[0]:
        raise UserError(
            "the method was made with another model; make it with the model that is trained, as in MAS(model)"
        )


def _warn_of_missing(splits: Sequence[Split]) -> None:
    missing = [split.name for split in splits if not len(split.query)]
    if missing:
        warnings.warn(
            f"the data of {shortened(printable(', '.join(missing)))} is missing: these splits are not evaluated, and the others "
            "are ranked in a gallery without their items",
            stacklevel=3,
        )


def _accelerator(given: Accelerator | None, recipe: Recipe) -> Accelerator:
    if given is not None and recipe.accumulate != 1:
        raise UserError(
            f"the recipe accumulates the gradients of {recipe.accumulate} batches, but an accelerator is given, which has such a "
            "number, too; pass Accelerator(gradient_accumulation_steps=...) or the recipe's number, not both"
        )
    if given is not None and recipe.precision is not None:
        raise UserError(
            f"the recipe has the precision '{recipe.precision}', but an accelerator is given, which has one, too; pass "
            "Accelerator(mixed_precision=...) or the recipe's precision, not both"
        )
    return given or make_accelerator(recipe)


def _prepared(model: nn.Module, method: Method, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """The model on the accelerator's device, compiled if the recipe says so; what the method stores follows it there."""
    check_processes(accelerator, model, method, recipe)
    device = device_of(model)
    prepared = prepare_model(model, accelerator)
    if device_of(model) != device:
        method.load_state_dict(method.state_dict())
    return torch.compile(prepared) if recipe.compile else prepared  # type: ignore[return-value]


def _consolidation_batches(split: Split, unlabeled: Any, recipe: Recipe) -> Iterable[Any]:
    """What a method consolidates on: unlabeled inputs if there are any, else the split's training items with their labels.

    They are not augmented, because importance and what else a method stores is measured on them.
    """
    if unlabeled is not None:
        return ordered_batches(unlabeled, batch_size=recipe.batch_size, num_workers=recipe.num_workers)
    # In random order: a loss over pairs says nothing about a batch of one class
    return training_batches(split.train, batch_size=recipe.batch_size, num_workers=recipe.num_workers, view="clean")
