"""A test of the contract of `Method`, for methods of this package and of users."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mas_embed.data import Part, Split, ordered_batches
from mas_embed.methods import Elastic, Method
from mas_embed.runtime.seeding import seeded
from mas_embed.training import (
    Callbacks,
    CheckpointEvery,
    Event,
    Learner,
    Recipe,
    SplitCheckpoints,
    Stopwatch,
    learn_split,
)

Factory = Callable[..., Method]

# Three steps a split: after the first, the parameters have left the anchor and a penalty has a gradient
RECIPES = {
    "SGD": Recipe(optimizer=partial(torch.optim.SGD, lr=0.05), epochs=1, batch_size=6),
    "SGD with momentum and weight decay": Recipe(
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2), epochs=1, batch_size=6
    ),
    "Adam": Recipe(optimizer=partial(torch.optim.Adam, lr=0.01), epochs=1, batch_size=6),
    "AdamW": Recipe(optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), epochs=1, batch_size=6),
    "SGD with clipping": Recipe(optimizer=partial(torch.optim.SGD, lr=0.05), epochs=1, batch_size=6, clip_norm=0.1),
    "SGD with accumulated gradients": Recipe(
        optimizer=partial(torch.optim.SGD, lr=0.05), epochs=3, batch_size=6, accumulate=3
    ),
}


def check_method(factory: Factory) -> None:
    """Raises `AssertionError` if a method violates the contract of `Method`; the message names the violated rule.

    Trains a small float64 network on splits of random points and checks the following rules:

    - A method with an attribute `strength` trains bit for bit like finetuning at strength 0, and differently at its default
      strength. Checked with SGD, momentum and weight decay, Adam, AdamW, gradient clipping, and gradient accumulation.
    - `penalty()` is 0 before the first `consolidate`, and `add_penalty_grad` adds its gradient. The penalty of an `Elastic`
      method is 0 at the anchor, and elsewhere has the value that a plain loop computes.
    - The state consists of tensors, numbers, strings and dicts of them, and training continues from it bit for bit, between
      splits and between the steps of a split.
    - Attributes, hooks, `.grad`, `requires_grad` and mode of the model, frozen parameters, and the random state of torch are
      unchanged.
    - A parameter that is added to the model is not pulled before the next `consolidate`.

    Args:
        factory: `(model, **options) -> Method`: the class, or `functools.partial(EWC, loss=loss)`, for example. If the method
            has an attribute `strength`, the factory must accept an option `strength`.

    Examples:
        >>> from mas_embed import MAS
        >>> check_method(MAS)
    """
    _check_side_effects(factory)
    _check_strength(factory)
    _check_penalty_before_the_first_split(factory)
    _check_gradient_form(factory)
    _check_elastic_penalty(factory)
    _check_resume(factory)
    _check_resume_within_split(factory)
    _check_model_is_unchanged(factory)
    _check_grown_parameter(factory)


def _check_side_effects(factory: Factory) -> None:
    """Checks the random state and `.grad`; first, because a side effect on the training itself can fail any later check."""
    model = _network()
    method = factory(model)
    for split_index in range(2):
        random_state = _train(model, method, split_index, RECIPES["SGD"])
        expected_state = _train(_network(), Method(model), split_index, RECIPES["SGD"])
        is_same_state = torch.equal(random_state, expected_state) or not method.is_learning
        assert is_same_state, "the method must not draw from torch's global generator"
        assert all(p.grad is None for p in model.parameters()), "consolidate() must leave .grad as it was"


def _check_strength(factory: Factory) -> None:
    if not hasattr(factory(_network()), "strength"):
        return
    for name, recipe in RECIPES.items():
        finetuned = _finetuned(name)
        without, _ = _trained(partial(factory, strength=0.0), recipe, num_splits=2)
        assert _is_same(finetuned, without), (
            f"strength 0 must train bit for bit like finetuning; under {name} it does not"
        )
        protected, _ = _trained(factory, recipe, num_splits=2)
        assert not _is_same(finetuned, protected), (
            f"under {name} the method does nothing: the trained model is that of finetuning"
        )
        is_finite = all(bool(value.isfinite().all()) for value in protected.state_dict().values())
        assert is_finite, f"under {name} training diverges"


@cache
def _finetuned(recipe_name: str) -> nn.Module:
    """The network after plain training, which is the same for every method that is checked."""
    return _trained(Method, RECIPES[recipe_name], num_splits=2)[0]


def _check_penalty_before_the_first_split(factory: Factory) -> None:
    model = _network()
    method = factory(model)
    assert method.penalty().shape == (), "penalty() must be a scalar, a tensor of shape []"
    assert method.penalty().item() == 0, "penalty() must be exactly 0 before the first consolidate"
    method.add_penalty_grad()
    is_unchanged = all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert is_unchanged, "add_penalty_grad() must add nothing before the first consolidate"


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
    _train(model, method, 0, RECIPES["SGD"])
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
    assert expected > 0, "every parameter has zero importance, so nothing is protected"
    assert difference <= 1e-10 * expected, (
        f"penalty() must be strength * sum of importance * (theta - anchor)^2, {expected}"
    )


def _check_resume(factory: Factory) -> None:
    model, method = _trained(factory, RECIPES["Adam"], num_splits=2)
    _check_is_plain(method.state_dict())
    state, weights = copy.deepcopy(method.state_dict()), copy.deepcopy(model.state_dict())
    resumed_model = _network(seed=1)
    resumed = factory(resumed_model)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for split_index in (2, 3):
        for trained_model, trained_method in ((model, method), (resumed_model, resumed)):
            _train(trained_model, trained_method, split_index, RECIPES["Adam"])
        assert _is_same(model, resumed_model), "training must continue from a loaded state bit for bit; it does not"


def _check_resume_within_split(factory: Factory) -> None:
    """Stores the first and the third split after its first step, and learns the rest again from there."""
    recipe = RECIPES["Adam"]
    for num_splits in (0, 2):
        model, method = _trained(factory, recipe, num_splits=num_splits)
        stored: list[tuple[Any, Any, Any]] = []

        def save(state: Mapping[str, Any], model: nn.Module = model, method: Method = method) -> None:
            stored.append(copy.deepcopy((model.state_dict(), method.state_dict(), state)))  # noqa: B023  (called at once)

        _train(model, method, num_splits, recipe, SplitCheckpoints(save, CheckpointEvery(steps=1)))
        if not stored:  # a method that does not learn this split
            continue
        weights, state, within_split = stored[0]
        resumed_model = _network(seed=1)
        resumed = factory(resumed_model)
        resumed_model.load_state_dict(weights)
        resumed.load_state_dict(state)
        _train(resumed_model, resumed, num_splits, recipe, SplitCheckpoints(stored=within_split))
        for trained_model, trained_method in ((model, method), (resumed_model, resumed)):
            _train(trained_model, trained_method, num_splits + 1, recipe)
        assert _is_same(model, resumed_model), (
            "training must continue bit for bit from a state that was stored between two steps of a split; the state must hold "
            "what the method gathers from begin_split() to consolidate()"
        )


def _check_model_is_unchanged(factory: Factory) -> None:
    model = _network()
    frozen = next(model.parameters()).requires_grad_(False)
    before, frozen_value = _description(model), frozen.clone()
    method = factory(model)
    for split_index in range(2):
        _train(model, method, split_index, RECIPES["SGD"])
    for name, description in _description(model).items():
        assert description == before[name], (
            f"the method must not change attributes, hooks or modes of modules, but '{name or 'the model'}' changed"
        )
    assert torch.equal(frozen, frozen_value), "the method must not change a frozen parameter"


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
        assert is_free, f"a parameter that was added later must not be pulled, but 'grown.{name}' is"
    model.zero_grad()
    _train(model, method, 2, RECIPES["SGD"])


def _trained(factory: Factory, recipe: Recipe, *, num_splits: int) -> tuple[nn.Module, Method]:
    model = _network()
    method = factory(model)
    for split_index in range(num_splits):
        _train(model, method, split_index, recipe)
    return model, method


def _train(
    model: nn.Module, method: Method, split_index: int, recipe: Recipe, checkpoints: SplitCheckpoints | None = None
) -> Tensor:
    """Trains on one split as `train_sequence` does; returns the state of torch's random generator afterwards."""
    split = _split(split_index)
    with seeded(split_index):
        if method.is_learning:
            accelerator = Accelerator(gradient_accumulation_steps=recipe.accumulate, device_placement=False)
            learn_split(
                Learner(model, method, loss, None, recipe, accelerator),
                split,
                consolidate_on=ordered_batches(split.train, batch_size=recipe.batch_size),
                callbacks=Callbacks(()),
                event=Event(method.name, 0, split.name, split_index, split_index + 1),
                stopwatch=Stopwatch(),
                checkpoints=checkpoints,
            )
        return torch.get_rng_state()


def loss(embeddings: Tensor, labels: Tensor, mined: Any = None) -> Tensor:  # noqa: ARG001  (the signature of all losses)
    """A training loss without randomness or parameters, which decreases as classes become compact and move apart."""
    distances = (embeddings[:, None] - embeddings).square().sum(dim=2)
    return torch.where(labels[:, None] == labels, distances, torch.exp(-distances)).mean()


def _network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _split(split_index: int, *, num_batches: int = 3, batch_size: int = 6) -> Split:
    """A split of random points in two classes that no other split has."""
    generator = torch.Generator().manual_seed(split_index)
    labels = 2 * split_index + torch.arange(num_batches * batch_size) % 2
    part = Part(torch.randn(len(labels), 3, generator=generator).double(), labels)
    return Split(f"split {split_index}", part, part, part)


def _moved(factory: Factory) -> tuple[nn.Module, Method]:
    """A method after two splits, and its model with parameters that then changed at random."""
    model, method = _trained(factory, RECIPES["SGD"], num_splits=2)
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


def _description(model: nn.Module) -> dict[str, Any]:
    """By module name everything that must not change: attributes, hooks, mode, and the identity and freezing of parameters."""
    description = {}
    for name, module in model.named_modules():
        attributes = {
            key: copy.copy(value) for key, value in vars(module).items() if key not in ("_parameters", "_buffers")
        }
        parameters = [(key, id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)]
        description[name] = (attributes, parameters)
    return description


def _check_is_plain(state: Any, path: str = "state") -> None:
    if isinstance(state, Mapping):
        for key, value in state.items():
            assert isinstance(key, str), f"the keys of a state must be strings, but {path} has {key!r}"
            _check_is_plain(value, f"{path}.{key}")
    else:
        is_plain = isinstance(state, Tensor | int | float | str | None)
        assert is_plain, (
            f"a state must be made of tensors, numbers, strings and dicts, but {path} is a {type(state).__name__}"
        )
