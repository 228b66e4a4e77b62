"""Forward passes of an embedding model on batches of tensors, tuples or mappings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.runtime.checks import shown
from mas_embed.runtime.text import printable, shortened

Embed = Callable[[nn.Module, Any], Tensor]
# The errors that models raise for inputs of another shape, dtype or type than they take
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError)

LABEL_KEYS = frozenset({"label", "labels", "target", "targets"})


def embed_batch(model: nn.Module, batch: Any, embed: Embed | str | None = None) -> Tensor:
    """The embeddings [N, D] of one batch.

    Args:
        model: any module that maps a batch of inputs to embeddings.
        batch: a tensor; a tuple or list whose first element is the input (the rest is ignored); or a mapping, whose values
            are passed to `model.forward` by keyword if `forward` names any of the keys, and else as one argument.
        embed: replaces the call of the model: a callable `(model, batch) -> Tensor [N, D]`, or the name of a method of the
            model that takes the input.

    Raises:
        UserError: the model has no method of that name, raises an error for this batch (which is then the cause of the
            `UserError`; a lack of memory is raised as it is), or returns something other than a tensor of shape [N, D].
    """
    try:
        embeddings = embed(model, batch) if callable(embed) else _call(_method(model, embed), input_of(batch))
    except _REFUSALS as error:
        if isinstance(error, UserError | RunError) or _is_out_of_memory(error):
            raise
        given = shortened(printable(_described(input_of(batch))))
        raise UserError(f"the model refuses inputs of {given}: {reason_of(error)}") from error
    if not isinstance(embeddings, Tensor):
        kind = type(embeddings).__name__
        raise UserError(
            f"the model must return a tensor [N, D], got {kind}; pass embed=(model, batch) -> tensor to pick one"
        )
    if embeddings.ndim != 2:
        raise UserError(f"embeddings must have shape [N, D], got {list(embeddings.shape)}; pool or flatten them first")
    return embeddings


def _method(model: nn.Module, name: str | None) -> Callable[..., Any]:
    """The method of the model with that name; the model itself for None."""
    if not name:
        return model
    method = getattr(model, name, None) if isinstance(name, str) else None
    if not callable(method):
        raise UserError(f"the model, a {type(model).__name__}, has no method {shown(name)} to embed with")
    return cast(Callable[..., Any], method)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate memory; for the memory of the CPU its error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _described(inputs: Any) -> str:
    """The shape and dtype of every tensor in the inputs, and the types of everything else."""
    if isinstance(inputs, Tensor):
        return f"shape {list(inputs.shape)} ({inputs.dtype})"
    kind = f"type {type(inputs).__name__}"
    if isinstance(inputs, Mapping):
        return f"{kind} ({', '.join(f'{key}: {_described(value)}' for key, value in inputs.items())})"
    if isinstance(inputs, tuple | list):
        return f"{kind} ({', '.join(map(_described, inputs[:4]))}{', ...' if len(inputs) > 4 else ''})"
    return kind


def check_module(model: object) -> None:
    """Raises `UserError` if the model is not a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch.nn.Module, got an object of type {type(model).__name__}")


def check_batches(batches: object) -> None:
    """Raises `UserError` if the batches are not iterable, or are a single batch."""
    if isinstance(batches, Tensor | np.ndarray | Mapping | str | bytes) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise UserError(f"batches must be an iterable of batches, got one {kind}; pass [batch], or a DataLoader")


def unwrap_compiled(model: nn.Module) -> tuple[nn.Module, str]:
    """The module inside a `torch.compile` wrapper and the prefix of its parameter names; without a wrapper, the model and ""."""
    check_module(model)
    inner = getattr(model, "_orig_mod", None)
    return (inner, "_orig_mod.") if isinstance(inner, nn.Module) else (model, "")


def input_of(batch: Any) -> Any:
    """The model's input in a batch: the first element of a tuple or list, and any other batch itself."""
    if isinstance(batch, tuple | list) and not batch:
        raise UserError(f"a batch is an empty {type(batch).__name__}; its first element must be the input of the model")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):
        return function(inputs)
    forward = function.forward if isinstance(function, nn.Module) else function
    parameters = inspect.signature(forward).parameters.values()
    keys = [key for key in inputs if key not in LABEL_KEYS]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function(**{key: inputs[key] for key in keys})
    named = {p.name for p in parameters} & set(keys)
    return function(**{key: inputs[key] for key in keys if key in named}) if named else function(inputs)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A copy of nested tuples, lists and mappings in which `function` was applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        if isinstance(batch, dict) or not isinstance(batch, MutableMapping):
            return mapped
        result = copy.copy(batch)  # keeps the class of the mapping, such as that of a tokenizer's output
        result.update(mapped)
        return result
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def batch_to(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`; inference-mode tensors are cloned, so that autograd can save them."""

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved

    return map_tensors(move, batch)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    check_module(model)
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
