"""Forward passes of an embedding model on batches of tensors, texts, tuples or mappings."""

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

LABEL_KEYS = frozenset({"label", "labels", "label_ids", "target", "targets"})


def embed_batch(model: nn.Module, batch: Any, embed: Embed | str | None = None) -> Tensor:
    """The embeddings [N, D] of one batch.

    Args:
        model: any module that maps a batch of inputs to embeddings.
        batch: a tensor; a list or tuple of texts; a mapping, whose values are passed to `model.forward` by keyword if
            `forward` names any of the keys, and else as one argument; or a tuple or list whose first element is one of these
            (the rest is ignored).
        embed: replaces the call of the model: a callable `(model, input) -> Tensor [N, D]`; the name of a method of the
            model that takes the input; or, if the model has no method of that name, one of `text_models.READY_MADE`.

    Raises:
        UserError: the model has no method of that name, raises an error for this batch (which is then the cause of the
            `UserError`; a lack of memory is raised as it is), or returns something other than a tensor of shape [N, D].
    """
    inputs, function = input_of(batch), embed_function(model, embed)
    try:
        embeddings = function(model, inputs) if function else call_with(_method(model, cast(str | None, embed)), inputs)
    except _REFUSALS as error:
        if isinstance(error, UserError | RunError) or is_out_of_memory(error):
            raise
        given = shortened(printable(_described(inputs)))
        remedy = "" if function else _remedy(model) or _remedy_of_parts(inputs)
        raise UserError(f"the model refuses inputs of {given}: {reason_of(error)}{remedy}") from error
    if not isinstance(embeddings, Tensor):
        remedy = _remedy(model, embeddings) or "; pass embed=(model, input) -> tensor to pick one"
        raise UserError(f"the model must return a tensor [N, D], got {type(embeddings).__name__}{remedy}")
    if embeddings.ndim != 2:
        raise UserError(f"embeddings must have shape [N, D], got {list(embeddings.shape)}; pool or flatten them first")
    return embeddings


def prepared_batch(model: nn.Module, batch: Any, embed: Embed | str | None) -> Any:
    """The batch with its texts as token ids on the model's device, if `embed` is a ready-made function that tokenizes texts.

    Samples that are taken from it later have the padding of the whole batch.
    """
    from mas_embed.runtime.text_models import tokenized, tokenizes  # it builds on this module

    if not tokenizes(embed_function(model, embed)) or not is_texts(inputs := input_of(batch)):
        return batch
    features = batch_to(tokenized(model, inputs), device_of(model))
    return features if batch is inputs else (features, *batch[1:])


def embed_function(model: nn.Module, embed: Embed | str | None) -> Embed | None:
    """The callable that `embed` is or names; None if the model itself, or a method of it, embeds."""
    from mas_embed.runtime.text_models import READY_MADE  # it builds on this module

    if callable(embed):
        return embed
    is_ready_made = isinstance(embed, str) and embed in READY_MADE and not callable(getattr(model, embed, None))
    return READY_MADE[cast(str, embed)] if is_ready_made else None


def _remedy(model: nn.Module, output: Any = None) -> str:
    """What to pass as `embed` for a text model that was called without a ready-made function; nothing for other models."""
    if any(base.__name__ == "SentenceTransformer" for base in type(model).__mro__):
        return "; pass embed='sentence_transformers', which tokenizes texts and returns embeddings with gradients"
    if getattr(output, "last_hidden_state", None) is not None:
        return "; pass embed='mean_pooling' or embed='cls_pooling'"
    return ""


def _remedy_of_parts(inputs: Any) -> str:
    """How to pass inputs of several parts to a model that takes them in another form; nothing for a single tensor."""
    if isinstance(inputs, Mapping):
        return (
            "; if it takes its inputs in another form, pass embed, as in embed=lambda model, batch: model(batch['...'])"
        )
    if isinstance(inputs, tuple | list) and not is_texts(inputs):
        return "; if it takes them one by one, pass embed=lambda model, inputs: model(*inputs)"
    return ""


def check_embed(model: nn.Module, embed: Embed | str | None) -> None:
    """Raises `UserError` if `embed` names nothing that embeds, which an estimate would notice after the training only."""
    if embed_function(model, embed) is None:
        _method(model, cast(str | None, embed))


def _method(model: nn.Module, name: str | None) -> Callable[..., Any]:
    """The method of the model with that name; the model itself for None."""
    if not name:
        return model
    method = getattr(model, name, None) if isinstance(name, str) else None
    if not callable(method):
        from mas_embed.runtime.text_models import READY_MADE  # it builds on this module

        raise UserError(
            f"the model, a {type(model).__name__}, has no method {shown(name)} to embed with; pass the name of a method, a "
            f"function (model, input) -> tensor, or one of {', '.join(map(repr, READY_MADE))}"
        )
    return cast(Callable[..., Any], method)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate memory; for the memory of the CPU its error has no class of its own."""
    known = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in known)


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


def is_texts(inputs: Any) -> bool:
    """Whether the inputs are a batch of texts: a list or tuple of at least one string, and of nothing else."""
    return isinstance(inputs, tuple | list) and len(inputs) > 0 and all(isinstance(text, str) for text in inputs)


def input_of(batch: Any) -> Any:
    """The model's input in a batch: the first element of a tuple or list, unless it is one of texts; else the batch itself."""
    if isinstance(batch, tuple | list) and not batch:
        raise UserError(f"a batch is an empty {type(batch).__name__}; its first element must be the input of the model")
    return batch[0] if isinstance(batch, tuple | list) and not is_texts(batch) else batch


def call_with(function: Callable[..., Any], inputs: Any) -> Any:
    """`function(inputs)`; a mapping is passed by keyword, without labels, if the function names any of its keys."""
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
    return map_leaves(function, batch, lambda part: isinstance(part, Tensor))


def map_leaves(function: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """A copy of nested tuples, lists and mappings in which `function` was applied to every part that is a leaf."""
    if is_leaf(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_leaves(function, value, is_leaf) for key, value in batch.items()}
        if isinstance(batch, dict) or not isinstance(batch, MutableMapping):
            return mapped
        result = copy.copy(batch)  # keeps the class of the mapping, such as that of a tokenizer's output
        result.update(mapped)
        return result
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(function, value, is_leaf) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_leaves(function, value, is_leaf) for value in batch)
    return batch


def batch_to(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`; inference-mode tensors are cloned, so that autograd can save them."""

    def move(tensor: Tensor) -> Tensor:
        # A copy to the CPU must be waited for: torch would return memory that the GPU has not filled yet
        moved = tensor.to(device, non_blocking=device.type != "cpu")
        return moved.clone() if moved.is_inference() and not torch.is_inference_mode_enabled() else moved

    return map_tensors(move, batch)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    check_module(model)
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
