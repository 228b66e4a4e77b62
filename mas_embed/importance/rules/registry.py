"""Exact rules: the sum over samples of |per-sample gradient|^exponent, for one layer family each.

A rule is a pure function `(layer, input, grad_output, exponent, names) -> {name: Tensor}`:

- `input` [N, ...] and `grad_output` [N, ...] are what the layer received in its one call of the batch, and the gradient
  of the batch's summed output with respect to what it returned; samples do not mix, so slice n belongs to sample n;
- `names` are the layer's own parameters that are wanted ("weight", "bias");
- the result has the parameter's shape, in float32 or wider: `sum_n |g_n|^exponent`.

Registering a rule for an exact class (subclasses may compute something else and take the exact fallback) is all it
takes::

    @rule(nn.Linear, min_ndim=2)
    def linear(layer, input, grad_output, exponent, names): ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

RuleFunction = Callable[[Any, Tensor, Tensor, int, Collection[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """A rule and where it holds.

    Attributes:
        function: the rule.
        min_ndim: dimensions of a batched input; with fewer the first dimension is not the samples.
        applies: whether the rule holds for this layer, as it is set up.
        forward: of the class, as it was when the rule was registered: one that was patched since is another layer.
        parameters: the parameters of the layer that the rule can give.
    """

    function: RuleFunction
    min_ndim: int
    applies: Callable[[Any], bool]
    forward: Callable[..., Any]
    parameters: tuple[str, ...] = ("weight", "bias")


RULES: dict[type[nn.Module], Rule] = {}


def rule(
    *layers: type[nn.Module], min_ndim: int, applies: Callable[[Any], bool] = lambda layer: True
) -> Callable[[RuleFunction], RuleFunction]:
    """A decorator that registers a function as the rule of the given layer classes."""

    def register(function: RuleFunction) -> RuleFunction:
        for layer in layers:
            RULES[layer] = Rule(function, min_ndim, applies, layer.forward)
        return function

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that holds for this very layer, if there is one."""
    found = RULES.get(type(layer))
    if found is None or "forward" in vars(layer) or type(layer).forward is not found.forward:
        return None
    return found if found.applies(layer) else None
