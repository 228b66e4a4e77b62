"""Continual learning with the `Trainer` of Hugging Face Transformers and its subclasses; tested with transformers 5.24.

`MethodCallback` adds a method to a trainer. `mean_pooling` and `cls_pooling` make one embedding of each text from the outputs
of a transformer; use them as `embed` of a method or of `estimate_importance`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from mas_embed import Method, UserError, cls_pooling, load_method, mean_pooling, require_library, save_method, seeded

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = require_library("transformers", extra="transformers").TrainerCallback

__all__ = ["MethodCallback", "cls_pooling", "mean_pooling"]

STATE_FILE = "mas_embed_method.safetensors"
LABEL_KEYS = ("labels", "label", "label_ids")

# The methods whose penalty a loss has added since the last step of the optimizer
_penalized_by_loss: WeakSet[Method] = WeakSet()
# The state of the training that every callback takes part in, which is one object for all callbacks of a trainer
_state_of: WeakKeyDictionary[MethodCallback, ReferenceType[TrainerState]] = WeakKeyDictionary()


class MethodCallback(TrainerCallback):
    """Trains with a method of continual learning in any Hugging Face `Trainer`, also that of sentence-transformers.

    One call of `trainer.train()` is one split. The callback calls the hooks of the method:

    - when training begins, `begin_split`; when training is resumed from a checkpoint, it loads the state of the method
      that was saved with the checkpoint instead;
    - before every step of the optimizer, once for all accumulated batches, `add_penalty_grad`, unless the loss of the
      trainer is a `WithPenalty` of the same method, which has added the penalty already;
    - after every step that was not skipped by the gradient scaler, `after_step`;
    - with every log of the training loss, it logs `penalty`;
    - with every checkpoint, it writes the state of the method into the checkpoint's folder;
    - when training ends, `consolidate`, on the model as the trainer leaves it, and then, if the trainer saves at all, it
      writes the new state into `output_dir`.

    The trainer clips gradients before the callback is called. The gradient of the penalty is therefore not clipped, and the
    loss's is clipped without regard to the penalty. Methods that read gradients, such as SI, read clipped ones.

    Args:
        method: any method that needs no access to single batches; its model is that of the trainer or a part of it.
        batches: what the method consolidates on when training ends. None: the training data of the trainer, in the trainer's
            batches. Batches with labels are then given as pairs `(batch, labels)`.

    Raises:
        UserError: the method extends batches or embeddings, or adds a penalty on the embeddings of a batch; or, when training
            begins, the method belongs to another model, does not learn the next split, parameters are sharded, the trainer
            has another MethodCallback, or there is no state to resume from.
    """

    def __init__(self, method: Method, *, batches: Iterable[Any] | None = None) -> None:
        check_batch_hooks(method, "MethodCallback")
        self.method, self.batches = method, batches

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a split, or restores the state of the method."""
        _check_trainer(self.method, kwargs["model"], args)
        _check_is_only_one(self, state)
        _penalized_by_loss.discard(self.method)
        if state.global_step > 0:
            load_method(_resumed_checkpoint(args, state) / STATE_FILE, self.method)
        else:
            self.method.begin_split()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the gradient of the penalty, unless the loss has added the penalty."""
        if self.method in _penalized_by_loss:
            _penalized_by_loss.discard(self.method)
        else:
            self.method.add_penalty_grad()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Informs the method of a step that was taken; the gradients are still there."""
        optimizer = kwargs["optimizer"]
        if not getattr(optimizer, "step_was_skipped", False):
            self.method.after_step(optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the penalty to the log of the training loss; a `WithPenalty` has logged it already."""
        if logs is None or "loss" not in logs or "penalty" in logs:
            return
        with torch.no_grad():
            logs["penalty"] = float(self.method.penalty())
        if state.log_history:
            state.log_history[-1]["penalty"] = logs["penalty"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the state of the method into the checkpoint."""
        if args.should_save:
            save_method(_checkpoint(args, state) / STATE_FILE, self.method)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the split."""
        batches = self.batches
        if batches is None:
            batches = _TrainingBatches(kwargs["model"], kwargs["train_dataloader"])
        with seeded(args.seed):  # a data loader draws from the global generators
            self.method.consolidate(batches)
        if args.should_save and args.save_strategy != "no":
            save_method(Path(args.output_dir or ".") / STATE_FILE, self.method)


def check_batch_hooks(method: Method, user: str) -> None:
    """Raises `UserError` if a method needs hooks that are called with single batches, for which a trainer has no place."""
    if not isinstance(method, Method):
        raise UserError(f"{user} takes a method, such as MAS(model), got an object of type {type(method).__name__}")
    if method.batch_hooks:
        raise UserError(
            f"{user} cannot call {' and '.join(sorted(method.batch_hooks))} of the method {method.name}, because the trainer "
            "runs the forward pass itself; use a method without these hooks, such as MAS, or train_sequence"
        )


def mark_penalized_by_loss(method: Method) -> None:
    """Tells the callback of the method that a loss has added the penalty to this step of the optimizer."""
    _penalized_by_loss.add(method)


class _TrainingBatches:
    """The batches of a trainer's data loader as a method consolidates on them; can be read several times."""

    def __init__(self, model: nn.Module, dataloader: Any) -> None:
        try:
            len(dataloader)
        except TypeError:
            raise UserError(
                "the training data has no length, so it may never end; pass MethodCallback(method, batches=...) "
                "what the method is to consolidate on"
            ) from None
        self._columns = _columns_of(model)
        self._dataloader = dataloader

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            columns, labels = self._columns(batch)
            for inputs in columns:
                yield inputs if labels is None else (inputs, labels)


def _columns_of(model: nn.Module) -> Callable[[Any], tuple[list[Any], Any]]:
    """A function that takes a batch of the trainer apart: into the inputs of the model for each text column, and labels."""
    if any(base.__module__.startswith("sentence_transformers.") for base in type(model).__mro__):
        from mas_embed.integrations.sentence_transformers import feature_columns

        return feature_columns
    return _one_column


def _one_column(batch: Any) -> tuple[list[Any], Any]:
    labels = next((batch[key] for key in LABEL_KEYS if key in batch), None) if isinstance(batch, Mapping) else None
    return [batch], labels


def _check_trainer(method: Method, model: nn.Module, args: TrainingArguments) -> None:
    """Raises `UserError` if training with the method would have no effect, or a wrong one."""
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise UserError(
            "MethodCallback needs whole parameters with whole gradients, but DeepSpeed and FSDP shard them; "
            "train with DDP or on one device"
        )
    trained = set(map(id, model.parameters()))
    if not all(id(parameter) in trained for parameter in method.model.parameters()):
        raise UserError(
            f"the method {method.name} belongs to another model than the one that the trainer trains; "
            "make the method with the model of the trainer"
        )
    if not method.is_learning:
        raise UserError(f"the method {method.name} does not learn a further split; do not train on it")


def _check_is_only_one(callback: MethodCallback, state: TrainerState) -> None:
    """Raises `UserError` if the trainer has two callbacks, which would count a method twice or write to the same file."""
    _state_of[callback] = ref(state)
    if any(other is not callback and reference() is state for other, reference in _state_of.items()):
        raise UserError(
            "the trainer has two MethodCallbacks, but one checkpoint holds the state of one method; pass one callback, of "
            "Combine(model, methods=[...]) for several methods"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which the trainer saves the checkpoint of the current step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that training is resumed from.

    A callback is not told the argument of `trainer.train(resume_from_checkpoint=...)`. `load_method` notices a wrong folder,
    because the model then has other weights.
    """
    given = args.resume_from_checkpoint
    folder = Path(given) if isinstance(given, str) and os.path.isdir(given) else _checkpoint(args, state)
    if not (folder / STATE_FILE).is_file():
        raise UserError(
            f"there is no state of a method in {folder}; set output_dir, or args.resume_from_checkpoint, to where the "
            "checkpoint is, which must have been saved with a MethodCallback"
        )
    return folder
