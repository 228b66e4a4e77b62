"""A test of the contract of embedding models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError, reason_of
from mas_embed.importance import estimate_importance, explain_coverage
from mas_embed.runtime.forward import embed_batch
from mas_embed.runtime.seeding import seeded

Factory = Callable[[], nn.Module]
_TOLERANCE = 1e-4  # of the largest absolute value, for sums in another order


def check_model(factory: Factory, inputs: Any) -> None:
    """Raises `AssertionError` if a model violates the contract of embedding models; the message names the violated rule.

    The rules:

    - It is a `torch.nn.Module` that embeds N inputs as a finite tensor [N, D], also for N = 1. D does not depend on N.
    - Its initial weights are drawn from torch's global generator, so that a seed gives the same ones again.
    - In eval mode the embeddings are the same each time, that of an input does not depend on the others in the batch, and
      neither weights nor buffers change.
    - In train mode there are gradients. `parameter_groups(lr)`, if the model has it, holds every trainable parameter once.
    - A copy, and a fresh model that loads the state dict, give the same embeddings.
    - `estimate_importance` works, is finite, and is not zero everywhere.

    Args:
        factory: `() -> model`: the function or class that is registered, or `functools.partial(backbone, weights="none")`.
        inputs: a batch of at least two different inputs: a tensor [N, ...], a list of texts, or a mapping of tensors [N, ...].

    Examples:
        >>> from mas_embed import small_conv
        >>> check_model(small_conv, torch.rand(4, 1, 8, 8))
    """
    model = _made(factory, seed=0)
    assert _num_samples(inputs) >= 2, "give a batch of at least two inputs"
    _check_seed(factory, model)
    embeddings = _check_shape(model, inputs)
    _check_eval_mode(model, inputs, embeddings)
    _check_independence(model, inputs, embeddings)
    _check_copies(factory, model, inputs, embeddings)
    _check_importance(model, inputs)
    _check_gradients(model, inputs)


def _made(factory: Factory, *, seed: int) -> nn.Module:
    with seeded(seed):
        model = factory()
    assert isinstance(model, nn.Module), f"a model must be a torch.nn.Module, got a {type(model).__name__}"
    return model.eval()


def _check_seed(factory: Factory, model: nn.Module) -> None:
    one, other = model.state_dict(), _made(factory, seed=0).state_dict()
    is_same = one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)
    assert is_same, "the same seed must give the same initial weights; draw them from torch's global generator only"


def _check_shape(model: nn.Module, inputs: Any) -> Tensor:
    embeddings, single = _embed(model, inputs), _embed(model, _row(inputs, 0))
    num_samples = _num_samples(inputs)
    assert embeddings.shape[0] == num_samples, (
        f"{num_samples} inputs must be embedded as [{num_samples}, D], got {list(embeddings.shape)}"
    )
    assert single.shape == (1, embeddings.shape[1]), (
        f"one input must be embedded as [1, {embeddings.shape[1]}], got {list(single.shape)}"
    )
    assert embeddings.is_floating_point() and bool(embeddings.isfinite().all()), "embeddings must be finite numbers"
    return embeddings


def _check_eval_mode(model: nn.Module, inputs: Any, embeddings: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    with seeded(1):
        again = _embed(model, inputs)
    assert torch.equal(embeddings, again), "in eval mode the embeddings must be the same each time; dropout must be off"
    changed = [name for name, value in model.state_dict().items() if not _is_equal(value, before[name])]
    assert not changed, f"in eval mode weights and buffers must not change, but '{changed[0]}' does"


def _check_independence(model: nn.Module, inputs: Any, embeddings: Tensor) -> None:
    alone = torch.cat([_embed(model, _row(inputs, index)) for index in range(len(embeddings))])
    difference = float((alone - embeddings).abs().max() / embeddings.abs().max().clamp(min=1e-30))
    assert difference <= _TOLERANCE, (
        f"in eval mode an embedding must not depend on the other inputs of the batch, but it changes by {difference:.1e} of the "
        "largest value"
    )


def _check_copies(factory: Factory, model: nn.Module, inputs: Any, embeddings: Tensor) -> None:
    assert torch.equal(_embed(copy.deepcopy(model), inputs), embeddings), "a copy must give the same embeddings"
    fresh = _made(factory, seed=1)
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"a fresh model must load the state dict: {reason_of(error)}") from None
    assert torch.equal(_embed(fresh, inputs), embeddings), (
        "a fresh model that loads the state dict must give the same embeddings; keep whatever they depend on in parameters and "
        "buffers"
    )


def _check_importance(model: nn.Module, inputs: Any) -> None:
    try:
        explain_coverage(model, inputs)
        importance = estimate_importance(model, [inputs], output="projection")
    except UserError as error:
        raise AssertionError(f"estimate_importance must work for the model: {error}") from error
    is_positive = any(bool(value.any()) for value in importance.values())
    assert is_positive, "the embeddings must depend on some trainable parameter, but the importance of all is zero"


def _check_gradients(model: nn.Module, inputs: Any) -> None:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    with seeded(0):
        embeddings = embed_batch(model, inputs)
        assert embeddings.requires_grad, "in train mode the embeddings must be differentiable"
        (embeddings * torch.randn_like(embeddings)).sum().backward()
    gradients = [parameter.grad for parameter in trainable.values() if parameter.grad is not None]
    assert any(bool(gradient.any()) for gradient in gradients), "in train mode some gradient must not be zero"
    parameter_groups: Any = getattr(model, "parameter_groups", None)
    if parameter_groups is not None:
        held = sorted(id(parameter) for group in parameter_groups(0.1) for parameter in group["params"])
        assert held == sorted(map(id, trainable.values())), (
            "parameter_groups(lr) must hold every trainable parameter once and no other"
        )


def _embed(model: nn.Module, inputs: Any) -> Tensor:
    try:
        with torch.no_grad():
            return embed_batch(model, inputs)
    except UserError as error:
        raise AssertionError(f"a model must embed a batch of inputs as [N, D]: {error}") from error


def _num_samples(inputs: Any) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def _row(inputs: Any, index: int) -> Any:
    """A batch of one input."""
    if isinstance(inputs, Mapping):
        return {name: value[index : index + 1] for name, value in inputs.items()}
    return inputs[index : index + 1]


def _is_equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)
