"""What every method promises, as checks that can be run on a method of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.methods import Elastic, Method

Batches = list[tuple[Tensor, Tensor]]
Factory = Callable[..., Method]


@dataclass(frozen=True)
class Setting:
    """How a split is trained: `num_micro_batches` backward passes for a step, gradients clipped to `clip` if it is given."""

    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    clip: float | None = None
    num_micro_batches: int = 1


SETTINGS = {
    "SGD": Setting(partial(torch.optim.SGD, lr=0.05)),
    "SGD with momentum and weight decay": Setting(partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)),
    "Adam": Setting(partial(torch.optim.Adam, lr=0.01)),
    "AdamW": Setting(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    "SGD with clipping": Setting(partial(torch.optim.SGD, lr=0.05), clip=0.1),
    "SGD with accumulated gradients": Setting(partial(torch.optim.SGD, lr=0.05), num_micro_batches=3),
}


def check_method(factory: Factory) -> None:
    """Raises `AssertionError`, with a sentence that says which, if a method breaks a promise that `Method` makes.

    Trains a small network in float64 over splits of random points, and checks that

    - strength 0, where the method has a strength, is finetune bit for bit, and its own strength is not: under SGD, momentum
      and weight decay, Adam, AdamW, clipping and accumulated gradients;
    - `penalty()` is 0 before the first `consolidate`, and its gradient is what `add_penalty_grad` adds; for an `Elastic` method
      it is 0 at the anchor, and off it what a plain loop gives;
    - the state is made of tensors, numbers and dicts of them, and training goes on from it bit for bit;
    - nothing is left on the model: attributes, hooks, `.grad`, `requires_grad`, mode, random state; frozen parameters stay;
    - a parameter that is added to the model is free until the next `consolidate`.

    Args:
        factory: `(model, **options) -> Method`: the class, or `functools.partial(EWC, loss=loss)`. If what it makes has an
            attribute `strength`, `strength` must be one of the options.

    Example:
        >>> from mas_embed import MAS
        >>> check_method(MAS)
    """
    _check_strength(factory)
    _check_penalty_before_the_first_split(factory)
    _check_gradient_form(factory)
    _check_elastic_penalty(factory)
    _check_resume(factory)
    _check_nothing_is_left(factory)
    _check_grown_parameter(factory)


def _check_strength(factory: Factory) -> None:
    if not hasattr(factory(_network()), "strength"):
        return
    for name, setting in SETTINGS.items():
        finetuned, _ = _trained(Method, setting)
        without, _ = _trained(partial(factory, strength=0.0), setting)
        assert _is_same(finetuned, without), f"strength 0 must be finetune bit for bit; under {name} it is not"
        protected, _ = _trained(factory, setting)
        assert not _is_same(finetuned, protected), (
            f"under {name} the method does nothing: training ends as finetune does"
        )
        is_finite = all(bool(value.isfinite().all()) for value in protected.state_dict().values())
        assert is_finite, f"under {name} training diverges"


def _check_penalty_before_the_first_split(factory: Factory) -> None:
    model = _network()
    method = factory(model)
    assert method.penalty().shape == (), "penalty() must be a scalar, a tensor of shape []"
    assert method.penalty().item() == 0, "penalty() must be exactly 0 before the first consolidate"
    method.add_penalty_grad()
    untouched = all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert untouched, "add_penalty_grad() must add nothing before the first consolidate"


def _check_gradient_form(factory: Factory) -> None:
    model, method = _moved(factory)
    method.add_penalty_grad()
    added = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
    if getattr(method, "decoupled", False):
        assert not any(value.any() for value in added.values()), "a decoupled method must add nothing to the gradients"
        return
    model.zero_grad()
    if method.penalty().requires_grad:
        method.penalty().backward()
    for name, parameter in model.named_parameters():
        is_equal = torch.allclose(added[name], _gradient(parameter), rtol=1e-10, atol=1e-14)
        assert is_equal, f"add_penalty_grad() must add the gradient of penalty(); for '{name}' it does not"


def _check_elastic_penalty(factory: Factory) -> None:
    model = _network()
    method = factory(model)
    if not isinstance(method, Elastic):
        return
    _train(model, method, _split(0), SETTINGS["SGD"])
    assert method.penalty().item() == 0, "penalty() must be exactly 0 at the anchor"
    _move(model)
    expected, total, num_values = 0.0, 0.0, 0
    for name, parameter in model.named_parameters():
        if name not in method.anchor:
            continue
        columns = (parameter.detach(), method.anchor[name], method.importance[name])
        for value, anchor, importance in zip(*(column.flatten().tolist() for column in columns), strict=True):
            expected += importance * (value - anchor) ** 2
            total, num_values = total + importance, num_values + 1
    expected *= method.strength * (num_values / total if method.normalize else 1.0)
    difference = abs(method.penalty().item() - expected)
    assert expected > 0, "no parameter has any importance: nothing is protected"
    assert difference <= 1e-10 * expected, (
        f"penalty() must be strength * sum of importance * (theta - anchor)^2, {expected}"
    )


def _check_resume(factory: Factory) -> None:
    model, method = _trained(factory, SETTINGS["Adam"], num_splits=2)
    _check_is_plain(method.state_dict())
    state, weights = copy.deepcopy(method.state_dict()), copy.deepcopy(model.state_dict())
    resumed_model = _network(seed=1)
    resumed = factory(resumed_model)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for split_index in (2, 3):
        for own, going_on in ((model, method), (resumed_model, resumed)):
            _train(own, going_on, _split(split_index), SETTINGS["Adam"])
        assert _is_same(model, resumed_model), "training must go on from a loaded state bit for bit; it does not"


def _check_nothing_is_left(factory: Factory) -> None:
    model = _network()
    frozen = next(model.parameters()).requires_grad_(False)
    before, value, random_state = _described(model), frozen.clone(), torch.get_rng_state()
    method = factory(model)
    for split_index in range(2):
        _train(model, method, _split(split_index), SETTINGS["SGD"])
        assert all(p.grad is None for p in model.parameters()), "consolidate() must leave .grad as it was"
    for name, described in _described(model).items():
        assert described == before[name], (
            f"the method must leave nothing on the model, but '{name or 'the model'}' changed"
        )
    assert torch.equal(random_state, torch.get_rng_state()), "the method must not draw from torch's global generator"
    assert torch.equal(frozen, value), "a frozen parameter must stay as it is"


def _check_grown_parameter(factory: Factory) -> None:
    model, method = _moved(factory)
    penalty = method.penalty().item()
    with torch.random.fork_rng():
        model.add_module("grown", nn.Linear(2, 2).double())
    grown = dict(model.get_submodule("grown").named_parameters())
    with torch.no_grad():
        for parameter in grown.values():
            parameter.fill_(3.0)
    assert method.penalty().item() == penalty, "a parameter that was added later must not be penalised"
    method.add_penalty_grad()
    method.after_step(torch.optim.SGD(model.parameters(), lr=0.1))
    for name, parameter in grown.items():
        is_free = not _gradient(parameter).any() and bool((parameter == 3.0).all())
        assert is_free, f"a parameter that was added later must be free, but 'grown.{name}' is pulled"
    model.zero_grad()
    _train(model, method, _split(2), SETTINGS["SGD"])


def _trained(factory: Factory, setting: Setting, *, num_splits: int = 3) -> tuple[nn.Module, Method]:
    model = _network()
    method = factory(model)
    for split_index in range(num_splits):
        _train(model, method, _split(split_index), setting)
    return model, method


def _train(model: nn.Module, method: Method, batches: Batches, setting: Setting, *, num_epochs: int = 2) -> None:
    """One split, with every hook where a training loop calls it."""
    optimizer = setting.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    if not method.is_learning:
        return
    method.begin_split()
    for step, batch in enumerate(batches * num_epochs, start=1):
        inputs, labels = method.extend_batch(*batch)
        embeddings = model(inputs)
        extra = method.batch_penalty(inputs, embeddings)
        value = loss(*method.extend_embeddings(embeddings, labels))
        ((value if extra is None else value + extra) / setting.num_micro_batches).backward()
        if step % setting.num_micro_batches:
            continue
        method.add_penalty_grad()
        if setting.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()
    method.consolidate(batches)


def loss(embeddings: Tensor, labels: Tensor, mined: Any = None) -> Tensor:  # noqa: ARG001  (called as other losses are)
    """A training loss without randomness or parameters: squared distances within classes, and nearness between them."""
    distances = (embeddings[:, None] - embeddings).square().sum(dim=2)
    return torch.where(labels[:, None] == labels, distances, torch.exp(-distances)).mean()


def _network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _split(split_index: int, *, num_batches: int = 3, batch_size: int = 6) -> Batches:
    """Batches of random points of two classes, which no other split has."""
    generator = torch.Generator().manual_seed(split_index)
    labels = 2 * split_index + torch.arange(batch_size) % 2
    return [(torch.randn(batch_size, 3, generator=generator).double(), labels) for _ in range(num_batches)]


def _moved(factory: Factory) -> tuple[nn.Module, Method]:
    """A model that has left the place where the last of two splits ended."""
    model, method = _trained(factory, SETTINGS["SGD"], num_splits=2)
    _move(model)
    return model, method


@torch.no_grad()
def _move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(99)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _is_same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def _described(model: nn.Module) -> dict[str, Any]:
    """What of each module must not change: attributes, hooks, mode, which parameters it has and which are frozen."""
    described = {}
    for name, module in model.named_modules():
        plain = {key: copy.copy(value) for key, value in vars(module).items() if key not in ("_parameters", "_buffers")}
        own = [(key, id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)]
        described[name] = (plain, own)
    return described


def _check_is_plain(state: Any, path: str = "state") -> None:
    if isinstance(state, Mapping):
        for key, value in state.items():
            assert isinstance(key, str), f"the keys of a state must be strings, but {path} has {key!r}"
            _check_is_plain(value, f"{path}.{key}")
    else:
        is_plain = isinstance(state, Tensor | int | float | str | None)
        assert is_plain, f"a state must be made of tensors, numbers and dicts, but {path} is a {type(state).__name__}"
