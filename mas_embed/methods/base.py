"""The base class of all methods, which defines the hooks that the training loop calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance import Importance
from mas_embed.registry import Registry
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import device_of, unwrap_compiled

METHODS = Registry("method")

Keeps = Literal["nothing", "statistics", "data"]
Loss = Callable[..., Tensor]  # (embeddings [N, D], labels [N], mined) -> []
_ORIGIN = "origin"  # the key of a state under which the method and the weights are named that it was saved with
_BATCH_HOOKS = ("extend_batch", "extend_embeddings", "batch_penalty")


class AnchoredParameter(NamedTuple):
    """A parameter that a method pulls towards an anchor.

    Attributes:
        importance: of every value of the parameter, >= 0, as it enters the penalty, but for the strength.
        anchor: the values that it is pulled towards.
    """

    importance: Tensor
    anchor: Tensor


class Method:
    """A method of continual learning: it reduces the forgetting of earlier splits while a model learns a new one.

    The hooks of this base class do nothing, which is plain finetuning. A method overrides the hooks that it needs.

    A training loop calls the hooks as follows::

        method.begin_split()
        for inputs, labels in batches:
            inputs, labels = method.extend_batch(inputs, labels)
            embeddings = model(inputs)
            extra = method.batch_penalty(inputs, embeddings)
            embeddings, labels = method.extend_embeddings(embeddings, labels)
            value = loss(embeddings, labels)
            (value if extra is None else value + extra).backward()
            method.add_penalty_grad()      # or add method.penalty() to the loss
            optimizer.step()
            method.after_step(optimizer)
            optimizer.zero_grad()
        method.consolidate(batches)        # once, at the end of a split

    With gradient accumulation, `extend_batch`, `batch_penalty` and `extend_embeddings` are called for every batch, and
    `add_penalty_grad` and `after_step` for every step of the optimizer. With several processes, every process calls all hooks.
    A loop that has no place for the first three hooks can train with every method whose `batch_hooks` are empty.
    Before the first `consolidate`, the hooks must not change the training; they may only record it.

    A method that stores something, from split to split or from step to step, overrides `_state` and `_load_state`: training
    can be interrupted after any step of the optimizer and go on from the state, without another `begin_split`. `state_dict`
    adds to the state which method it is of and a fingerprint of the model's weights, and `load_state_dict` refuses the state
    of another method or of other weights.

    `mas_embed.testing.check_method` tests whether a method fulfils this contract.

    Args:
        model: the embedding model that is trained. If it is wrapped for several processes, the model inside the wrapper.

    Attributes:
        keeps: which data of earlier splits the method stores: "nothing", "statistics" of classes, or samples ("data"). Copies
            of the model and values for its parameters do not count as data. Reports show this attribute.
        joins_splits: whether an experiment trains the method on one split with the items of all splits, as in joint training,
            instead of on one split after another.
        consolidates_shares: whether, in several processes, `consolidate` can be given a share of the batches in each of them,
            because what it stores is added up over processes, as `estimate_importance` does. Other methods are given all
            batches in every process.
        name: the name of the method for callbacks, tables and folders; by default the name of the class.

    Raises:
        UserError: the model is not a `torch.nn.Module`.
    """

    keeps: Keeps = "nothing"
    joins_splits: bool = False
    consolidates_shares: bool = False
    _options: dict[str, Any]  # of the constructor, with which the method was made

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        method = super().__new__(cls)
        method._options = _given_options(cls, args, kwargs)
        return method

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"{type(self).__name__} takes the model as one torch.nn.Module, got an object of type {type(model).__name__}; "
                "combine several modules in one, as in nn.Sequential(trunk, embedder), or in nn.ModuleDict with embed="
            )
        self.model = model
        self.name = type(self).__name__

    @property
    def is_learning(self) -> bool:
        """Whether the next split is trained on."""
        return True

    @property
    def batch_hooks(self) -> frozenset[str]:
        """The hooks among "extend_batch", "extend_embeddings" and "batch_penalty" that the method overrides.

        If it is empty, the method needs no access to the batches in training: `begin_split`, `penalty` or `add_penalty_grad`,
        `after_step` and `consolidate` are enough, as in a callback of a trainer that runs the forward pass itself.
        """
        return frozenset(name for name in _BATCH_HOOKS if getattr(type(self), name) is not getattr(Method, name))

    @property
    def is_exact_in_processes(self) -> bool:
        """Whether `train_sequence` trains with the method in several processes as it does in one.

        True for methods without `batch_hooks`. A method with such hooks overrides it if they do the same to the shares of a batch
        as to the whole: `mas_embed.runtime.distributed` has `rows_of_whole_batch`, for penalties over all samples, and
        `own_share`, for items that are added.
        """
        return not self.batch_hooks

    @property
    def acts_after_step(self) -> bool:
        """Whether the method needs `after_step`, so that a loop without a place for this hook cannot train with it."""
        return type(self).after_step is not Method.after_step

    @property
    def num_bytes(self) -> int:
        """The memory that the method needs between splits: the size of the tensors in its state, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self._state_without_origin()))

    def begin_split(self) -> None:
        """Called before the training on a split starts."""

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch that is trained on: the given batch, with further items appended if the method adds any."""
        return inputs, labels

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings [N, D] and labels [N] for the miner and the loss, with further rows appended if the method adds any."""
        return embeddings, labels

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """A scalar to add to the loss of a batch, differentiable in its embeddings [N, D]; None if there is nothing to add."""
        return None

    def penalty(self) -> Tensor:
        """A scalar to add to the loss, differentiable in the model's parameters; exactly 0 before the first `consolidate`."""
        return torch.zeros((), device=device_of(self.model))

    def add_penalty_grad(self) -> None:
        """Adds the gradient of `penalty()` to the `.grad` of the parameters, which is cheaper than a penalty in the loss.

        Call it once per optimizer step: after the last `backward()` of accumulated batches, after the `unscale_` of a gradient
        scaler, and before gradients are clipped.
        """

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every `optimizer.step()` that was not skipped, before the gradients are cleared."""

    def consolidate(self, batches: Iterable[Any]) -> Importance | None:
        """Ends a split: stores what the method needs of it for the following splits.

        Args:
            batches: pairs `(inputs, labels)` of the split. A method that ignores labels also accepts unlabeled inputs.

        Returns:
            The importance of the split, from methods that estimate it; else None.
        """
        return None

    def anchored_parameters(self) -> dict[str, AnchoredParameter]:
        """The parameters that the method pulls towards an anchor, by name; empty for methods that do not.

        Reports show how important they are, and how far they move.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the method stores between splits and between steps, as tensors, numbers, strings, and dicts of them.

        Its entry "origin" holds the name of the method's class and a fingerprint of the weights that the model has now, which
        `load_state_dict` compares. Cost: one pass over the parameters and buffers of the model. Override `_state` instead.
        """
        origin = {"method": type(self).__name__, "weights": self._fingerprint()}
        return {**self._state(), _ORIGIN: origin}

    def load_state_dict(
        self, state: Mapping[str, Any], *, allow_other_method: bool = False, allow_other_weights: bool = False
    ) -> None:
        """Restores the result of `state_dict`, so that training continues as if it had not been interrupted.

        Load the weights of the model first. A state without the entry "origin", as earlier versions saved it, is loaded without
        a comparison. Override `_load_state` instead.

        Args:
            state: the result of `state_dict`.
            allow_other_method: whether to accept the state of another class of methods that has the same entries, such as the
                importance and the anchor of MAS for EWC.
            allow_other_weights: whether to accept a state that was saved when the model had other weights than now.

        Raises:
            UserError: the state lacks entries, or is of another method, other weights or another model. The method is then
                unchanged.
        """
        self._check_state(state)
        allowed = {"method": allow_other_method, "weights": allow_other_weights}
        state = _without_origin(state, {key for key, is_allowed in allowed.items() if is_allowed})
        origin, own = state.get(_ORIGIN, {}), type(self).__name__
        if origin.get("method", own) != own:
            raise UserError(
                f"the state is of {origin['method']}, not of {own}; make the method that it was saved with, or pass "
                "load_state_dict(state, allow_other_method=True)"
            )
        if "weights" in origin and origin["weights"] != self._fingerprint():
            copy.copy(self)._load_state(state)  # says it more precisely if the parameters have other names or shapes
            raise UserError(
                f"the state of {own} was saved when the model had other weights than now; load the weights that belong to it "
                "first, or pass load_state_dict(state, allow_other_weights=True)"
            )
        self._load_state(state)

    def _state(self) -> dict[str, Any]:
        """The entries of `state_dict` that a subclass stores; their keys are the same at any time."""
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `_state`; assigns new objects to attributes and does not change the old ones in place.

        Args:
            state: has all entries of `_state`, and others that are ignored.
        """

    def _state_without_origin(self) -> dict[str, Any]:
        """The state without its origin, which costs a pass over the weights; also of a subclass that overrides `state_dict`."""
        is_overridden = type(self).state_dict is not Method.state_dict
        return self.state_dict() if is_overridden else self._state()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises `UserError` for a state that lacks one of the keys of this method's state."""
        missing = self._state_without_origin().keys() - state.keys() - {_ORIGIN}
        if missing:
            method = state.get(_ORIGIN, {}).get("method")
            of_which = f" but of {method}" if method not in (None, type(self).__name__) else ""
            raise UserError(
                f"the state lacks {', '.join(sorted(missing))}; it is not a state of {type(self).__name__}{of_which}"
            )

    def _fingerprint(self) -> str:
        """The fingerprint of the weights, which is the same for a compiled model."""
        return fingerprint_of(unwrap_compiled(self.model)[0])


# A class without a constructor of its own shows that of the base class
Method.__new__.__signature__ = inspect.signature(Method.__init__)  # type: ignore[attr-defined]


def _given_options(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, defaults included, without the model; none if they do not fit."""
    signature = inspect.signature(cls)
    try:
        bound = signature.bind(*args, **kwargs)
    except (
        TypeError
    ):  # which the constructor itself will say; or a copy is made, which takes the attribute of its original
        return {}
    bound.apply_defaults()
    options = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options |= options.pop(name)
    options.pop("model", None)
    return options


def _without_origin(state: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """The state without the given keys in any origin, that of the whole state and those of the states inside it."""
    if not keys:
        return dict(state)
    inner = {key: _without_origin(value, keys) if isinstance(value, Mapping) else value for key, value in state.items()}
    if isinstance(inner.get(_ORIGIN), dict):
        inner[_ORIGIN] = {key: value for key, value in inner[_ORIGIN].items() if key not in keys}
    return inner


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
