"""Methods of continual learning in the trainers of pytorch-metric-learning, without a subclass; tested with version 2.9.

A method takes part in a trainer in one of two forms, which train the same: `WithPenalty` adds the penalty to a loss, and
`gradient_clippers` adds its gradient after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mas_embed import SI, Combine, Method, UserError
from mas_embed.integrations.metric_learning_splits import (
    ONE_FORM,
    Hook,
    check_method_of_trainer,
    copy_classes,
    next_split,
    score_hook,
)

__all__ = [
    "ExtendedBatches",
    "IterationHook",
    "WithPenalty",
    "copy_classes",
    "gradient_clippers",
    "joined",
    "next_split",
    "score_hook",
]

_PENALTY = "penalty"  # its entry in `trainer.losses`
# The trainers accept every key that starts with "trunk_grad_clipper", and users have clippers with exactly this name
_CLIPPER = "trunk_grad_clipper_penalty"


def joined(models: Mapping[str, nn.Module]) -> nn.Module:
    """One module that computes what the trainer trains: `embedder(trunk(inputs))`. Make the method with it.

    The modules are shared, not copied. Wrappers for several devices or processes are left out.

    Args:
        models: the `models` of the trainer: a "trunk" and, if there is one, an "embedder". Others, such as a classifier, do
            not take part in the embeddings and are not protected.

    Raises:
        UserError: there is no trunk.
    """
    if "trunk" not in models:
        raise UserError(f"models must have a 'trunk', as for a trainer, got {', '.join(models) or 'none'}")
    parts = {name: models[name] for name in ("trunk", "embedder") if name in models}
    result = nn.Sequential()
    for name, part in parts.items():
        result.add_module(name, part.module if isinstance(part, DataParallel | DistributedDataParallel) else part)
    return result


class ExtendedBatches:
    """A `data_and_label_getter` that appends the items of methods such as `Replay` to every training batch.

    Args:
        method: the method whose `extend_batch` is called.
        getter: maps a batch of the data loader to inputs and labels [N]; None for batches that are such pairs.

    Raises:
        UserError: in training, a batch is not a pair of a tensor and a tensor of labels [N].
    """

    def __init__(self, method: Method, getter: Callable[[Any], Any] | None = None) -> None:
        self.method, self._getter = method, getter

    def __call__(self, batch: Any) -> tuple[Any, Tensor]:
        pair = batch if self._getter is None else self._getter(batch)
        if len(pair) != 2 or not all(isinstance(item, Tensor) for item in pair) or pair[1].ndim != 1:
            raise UserError("a batch that a method extends must be a pair (inputs, labels) of tensors, with labels [N]")
        device = next((parameter.device for parameter in self.method.model.parameters()), None)
        inputs, labels = (item.to(device) for item in pair)
        return self.method.extend_batch(inputs, labels)


class IterationHook:
    """An `end_of_iteration_hook` that calls the method's `after_step` and logs the penalty as `trainer.losses["penalty"]`.

    The logged value is the one that `WithPenalty` added to the loss. In the gradient form it is computed after the step. It is
    not part of the total loss. The hook runs after the step of the optimizers, so it cannot itself add a penalty.

    Args:
        method: the method that the trainer trains with.
        then: a hook that is called afterwards, such as that of a `HookContainer`, which records the losses.

    Raises:
        UserError: in training, the trainer adds the penalty more than once or not at all, or trains another model.
    """

    def __init__(self, method: Method, then: Hook | None = None) -> None:
        self.method, self._then = method, then
        self._is_checked = False

    def __call__(self, trainer: Any) -> Any:
        if not self._is_checked:
            _check_trainer(trainer, self.method)
            self._is_checked = True
        optimizers = _stepped_optimizers(trainer)
        if optimizers:
            self.method.after_step(_Optimizers(optimizers))
        added = [wrapper.penalty for wrapper in _wrappers(trainer, self.method)]
        with torch.no_grad():
            trainer.losses[_PENALTY] = added[0] if added else self.method.penalty()
        trainer.loss_tracker.loss_weights[_PENALTY] = 1.0  # a record keeper needs the same entries in every iteration
        return None if self._then is None else self._then(trainer)


class WithPenalty(nn.Module):
    """A loss plus the penalty of a method, `loss(embeddings, labels, ...) + method.penalty()`, for the `loss_funcs` of a trainer.

    Wrap one loss of the trainer, after all other wrappers: `WithPenalty(DistributedLossWrapper(loss), method)`. Inside a
    `DistributedLossWrapper`, the penalty would be multiplied by the number of processes; that class and `CrossBatchMemory`
    refuse losses of other libraries. A trainer multiplies the wrapped loss, and with it the penalty, by the loss's entry in
    `loss_weights`. With accumulated gradients, divide the sum by the number of batches of a step, as any mean loss.

    At strength 0 and before the first `consolidate` the result is that of the loss, bit for bit. The `state_dict` contains
    the state of the method, so that it is saved and loaded with the loss. Other attributes are those of the wrapped loss.

    Args:
        loss: any loss whose result is a scalar.
        method: a method made with the model that the trainer trains, see `joined`.
        extend_batch: the `data_and_label_getter` of the trainer, for methods that extend the batch.
        after_step: the `end_of_iteration_hook` of the trainer, for methods that act after a step.

    Attributes:
        penalty: the last penalty that was added, [], which a record keeper records.

    Raises:
        UserError: the loss form is not exact for the method; the message names the form that is.
    """

    def __init__(
        self,
        loss: nn.Module,
        method: Method,
        *,
        extend_batch: ExtendedBatches | None = None,
        after_step: IterationHook | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise UserError(f"the loss must be a torch.nn.Module, got an object of type {type(loss).__name__}")
        _check_method(method, extend_batch, after_step)
        for part in _parts(method):
            if isinstance(part, SI) or getattr(part, "decoupled", False):
                reason = "reads the gradient without the penalty" if isinstance(part, SI) else "is decoupled"
                raise UserError(
                    f"{part.name} {reason}, so its penalty cannot be added to a loss; "
                    "use gradient_clippers(method, after_step=...)"
                )
        self.loss, self.method = loss, method
        self.penalty: Tensor | float = 0.0
        self._record_these = [_PENALTY]

    def forward(self, embeddings: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """The loss of the embeddings [N, D] plus the penalty, []; the arguments are those of the wrapped loss."""
        _check_is_learning(self.method)
        if "extend_embeddings" in self.method.batch_hooks:
            embeddings, arguments = self._extended(embeddings, arguments, options)
        value: Tensor = self.loss(embeddings, *arguments, **options)
        penalty = self.method.penalty()
        self.penalty = penalty.detach()
        if not penalty.requires_grad or all(getattr(part, "strength", 1) == 0 for part in _parts(self.method)):
            return value
        return value + penalty

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the method, as a part of the `state_dict`."""
        return {"method": self.method.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores the state of the method."""
        self.method.load_state_dict(state["method"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "loss":
                raise
            return getattr(self.loss, name)

    def _extended(self, embeddings: Tensor, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """The embeddings and the arguments after them, with the rows and labels that the method appends."""
        labels, mined, *others = (*arguments, None, None)
        if not isinstance(labels, Tensor) or options or any(value is not None for value in others):
            raise UserError(
                f"{self.method.name} extends embeddings, so the loss must be called with (embeddings, labels)"
            )
        extended, extended_labels = self.method.extend_embeddings(embeddings, labels.to(embeddings.device))
        if mined is not None and len(extended) > len(embeddings):
            raise UserError(
                f"{self.method.name} appends embeddings, which the pairs of a miner do not contain; train without 'tuple_miner'"
            )
        return extended, (extended_labels, mined)


class _AddPenaltyGrad:
    """Calls `add_penalty_grad` of a method."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self) -> None:
        _check_is_learning(self.method)
        self.method.add_penalty_grad()


def gradient_clippers(
    method: Method,
    *,
    clippers: Mapping[str, Callable[[], Any]] | None = None,
    extend_batch: ExtendedBatches | None = None,
    after_step: IterationHook | None = None,
) -> dict[str, Callable[[], Any]]:
    """The `gradient_clippers` of a trainer that add the gradient of the penalty, and then call other clippers.

    A trainer calls its clippers in their order after the backward pass and before the step of the optimizers. This form is
    cheaper than `WithPenalty`. The penalty is not multiplied by `loss_weights`.

    Args:
        method: a method made with the model that the trainer trains, see `joined`.
        clippers: the other clippers of the trainer, by their keys, such as "trunk_grad_clipper".
        extend_batch: the `data_and_label_getter` of the trainer, for methods that extend the batch.
        after_step: the `end_of_iteration_hook` of the trainer, for methods that act after a step: SI and decoupled methods.

    Raises:
        UserError: the gradient form is not exact for the method, or lacks one of its hooks.
    """
    _check_method(method, extend_batch, after_step)
    if "extend_embeddings" in method.batch_hooks:
        raise UserError(f"{method.name} extends embeddings, which a gradient clipper does not receive; use WithPenalty")
    if clippers and _CLIPPER in clippers:
        raise UserError("the clippers already add the penalty of a method; make one method of both with Combine")
    return {_CLIPPER: _AddPenaltyGrad(method), **(clippers or {})}


def _parts(method: Method) -> list[Method]:
    """The methods that a `Combine` consists of; of any other method the method itself."""
    if isinstance(method, Combine):
        return [part for combined in method.methods for part in _parts(combined)]
    return [method]


def _changes_gradient(part: Method) -> bool:
    """Whether a method has a penalty for `WithPenalty` or `gradient_clippers`; SI also records the gradient there."""
    if isinstance(part, SI):
        return True
    is_overridden = (
        type(part).penalty is not Method.penalty or type(part).add_penalty_grad is not Method.add_penalty_grad
    )
    return is_overridden and not getattr(part, "decoupled", False)


def _check_method(method: Method, extend_batch: ExtendedBatches | None, after_step: IterationHook | None) -> None:
    """Raises `UserError` for a method that needs a hook that nobody calls."""
    if not isinstance(method, Method):
        raise UserError(f"the method must be a Method such as MAS(joined(models)), got a {type(method).__name__}")
    for part in _parts(method):
        if "batch_penalty" in part.batch_hooks:
            raise UserError(
                f"{part.name} needs the inputs and the embeddings of a batch together, which no part of a trainer receives; "
                "use train_sequence or a loop of your own"
            )
        if "extend_batch" in part.batch_hooks and (extend_batch is None or extend_batch.method is not method):
            raise UserError(
                f"{part.name} extends batches: pass getter = ExtendedBatches(method) to the trainer as data_and_label_getter, "
                "and here as extend_batch=getter"
            )
        if part.acts_after_step and (after_step is None or after_step.method is not method):
            raise UserError(
                f"{part.name} acts after every step: pass hook = IterationHook(method) to the trainer as "
                "end_of_iteration_hook, and here as after_step=hook"
            )


def _check_is_learning(method: Method) -> None:
    if not method.is_learning:
        raise UserError(f"{method.name} does not train on this split; skip trainer.train()")


def _wrappers(trainer: Any, method: Method) -> list[WithPenalty]:
    losses = trainer.loss_funcs.values()
    return [loss for loss in losses if isinstance(loss, WithPenalty) and loss.method is method]


def _check_trainer(trainer: Any, method: Method) -> None:
    """Raises `UserError` unless the trainer trains the method's model and adds its penalty exactly once."""
    parts = [*trainer.loss_funcs.values(), *(trainer.gradient_clippers or {}).values()]
    if any(map(_changes_gradient, _parts(method))) and not any(
        getattr(part, "method", None) is method for part in parts
    ):
        raise UserError(f"the trainer never adds the penalty of {method.name}; {ONE_FORM}")
    check_method_of_trainer(method, trainer.models.values(), parts)


class _Optimizers(torch.optim.Optimizer):
    """Several optimizers as the one that `after_step` receives; it is never stepped."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = {key: value for optimizer in optimizers for key, value in optimizer.state.items()}  # type: ignore[assignment]


def _stepped_optimizers(trainer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that have just made a step; none where adversarial training steps only the generator's."""
    if not getattr(trainer, "do_metric", True):
        return []
    return [
        optimizer
        for name, optimizer in trainer.optimizers.items()
        if name.removesuffix("_optimizer") not in trainer.freeze_these
    ]
