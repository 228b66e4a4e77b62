"""The loop over splits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn

from mas_embed.data import Split, check_splits, ordered_batches
from mas_embed.errors import UserError
from mas_embed.evaluation import BEFORE_FIRST, Evaluator, RetrievalEvaluator
from mas_embed.methods import Loss, Method
from mas_embed.runtime.distributed import check_one_process
from mas_embed.runtime.forward import device_of, unwrap_compiled
from mas_embed.runtime.seeding import seeded
from mas_embed.training.callbacks import Callback, Callbacks, Event, RunEnd, SplitEnd
from mas_embed.training.checkpoint import save_checkpoint
from mas_embed.training.loading import training_batches
from mas_embed.training.plan import make_plan
from mas_embed.training.progress import restore
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


@_refuses_moved_arguments
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
    accelerator: Accelerator | None = None,
    seed: int = 0,
) -> SequenceResult:
    """Trains a model on one split after another and measures after each what it knows of all.

    Every split starts with a fresh optimizer and a fresh copy of the loss and the miner, so that no momentum, proxy or
    memory of the last split lives on. After a split the method consolidates on the split's training items, then the
    evaluator measures the model. The same seed on the same machine gives the same scores; on a GPU, where torch's kernels may
    round differently from run to run, only with `torch.use_deterministic_algorithms(True)`.

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
        checkpoint: a file that is written after every split.
        resume: go on from `checkpoint` if it exists; the split in which training stopped starts again.
        accelerator: for devices and precision; by default what `accelerate` finds. One process only.
        seed: of batches, miners and whatever the model draws; mixed with the split's index.

    Raises:
        UserError: a split is empty or the evaluator refuses it; the method was made with another model; there is a checkpoint
            and `resume` is False, or it is one of another sequence; its folder does not exist; both the accelerator and the
            recipe accumulate gradients; there are several processes; an argument has moved, which the sentence names.
        RunError: training diverged.
    """
    evaluated_splits = splits if evaluate_on is None else evaluate_on
    check_splits(splits)
    check_splits(evaluated_splits)
    _check_components(model, method, loss, miner, recipe, evaluator, callbacks)
    evaluator = RetrievalEvaluator() if evaluator is None else evaluator
    accelerator = _accelerator(accelerator, recipe)
    learner = Learner(_prepared(model, method, accelerator), method, loss, miner, recipe, accelerator)
    plan: dict[str, Any] = {}
    if checkpoint is not None:
        plan = make_plan(learner, splits, evaluated_splits, importance_data=importance_data, seed=seed)
    progress = restore(checkpoint, resume, plan, model, method, evaluator)
    notified, stopwatch = Callbacks(tuple(callbacks)), Stopwatch(progress.seconds)
    if not progress.initial:
        with stopwatch.timed("evaluation"):
            progress.initial = evaluator.evaluate(model, evaluated_splits, BEFORE_FIRST).scores
    for split_index in range(len(progress.scores), len(splits)):
        split = splits[split_index]
        event = Event(method.name, seed, split.name, split_index, len(splits))
        last_learned = split_index if evaluate_on is None else len(evaluated_splits) - 1
        if evaluate_on is None:
            with stopwatch.timed("evaluation"):
                evaluator.begin_split(model, splits, split_index)
        if method.is_learning:
            consolidate_on = _consolidation_batches(split, importance_data, recipe)
            with seeded(seed, split_index):
                progress.num_steps += learn_split(
                    learner, split, consolidate_on=consolidate_on, callbacks=notified, event=event, stopwatch=stopwatch
                )
        with stopwatch.timed("evaluation"):
            evaluation = evaluator.evaluate(model, evaluated_splits, last_learned)
        progress.record(evaluation)
        if checkpoint is not None:
            save_checkpoint(Path(checkpoint), model, method, evaluator, {"plan": plan, **asdict(progress)})
        notified.on_split_end(SplitEnd(**vars(event), evaluation=evaluation))
    result = progress.as_result([split.name for split in evaluated_splits], method=method, seed=seed)
    notified.on_run_end(RunEnd(method.name, seed, splits[-1].name, len(splits) - 1, len(splits), result))
    return result


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


def _accelerator(given: Accelerator | None, recipe: Recipe) -> Accelerator:
    if given is not None and recipe.accumulate != 1:
        raise UserError(
            f"the recipe accumulates the gradients of {recipe.accumulate} batches, but an accelerator is given, which has such a "
            "number, too; pass Accelerator(gradient_accumulation_steps=...) or the recipe's number, not both"
        )
    accelerator = given or Accelerator(gradient_accumulation_steps=recipe.accumulate)
    check_one_process(accelerator.num_processes)
    return accelerator


def _prepared(model: nn.Module, method: Method, accelerator: Accelerator) -> nn.Module:
    """The model on the accelerator's device; what the method stores follows it there."""
    device = device_of(model)
    prepared: nn.Module = accelerator.prepare_model(model)
    if device_of(model) != device:
        method.load_state_dict(method.state_dict())
    return prepared


def _consolidation_batches(split: Split, unlabeled: Any, recipe: Recipe) -> Iterable[Any]:
    """What a method consolidates on: unlabeled inputs if there are any, else the split's training items with their labels.

    They are not augmented, because importance and what else a method stores is measured on them.
    """
    if unlabeled is not None:
        return ordered_batches(unlabeled, batch_size=recipe.batch_size, num_workers=recipe.num_workers)
    # In random order: a loss over pairs says nothing about a batch of one class
    return training_batches(split.train, batch_size=recipe.batch_size, num_workers=recipe.num_workers, view="clean")
