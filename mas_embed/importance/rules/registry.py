"""The registry of exact rules; a rule computes the sum over samples of |per-sample gradient|^exponent for one layer family.

A rule is a pure function `(layer, input, grad_output, exponent, names) -> {name: Tensor}`:

- `input` [N, ...] is the input of the layer's only call in the batch, and `grad_output` [N, ...] is the gradient of the
  summed output of the batch with respect to the result of that call. The samples are independent, so slice n of both belongs
  to sample n;
- `names` are the names within the layer of the parameters to compute ("weight", "bias");
- the result is `sum_n |g_n|^exponent` for each of them, in the parameter's shape and in float32 or wider.

A rule is registered for exact classes. It does not apply to their subclasses, which may compute something else and use the
exact fallback::

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
    """A rule and the conditions under which it is exact.

    Attributes:
        function: the rule.
        min_ndim: the smallest number of dimensions of a batched input; with fewer, the first dimension is not the samples.
        applies: returns whether the rule is exact for a layer with the options of this one.
        forward: the `forward` of the class at registration; the rule is not used if it has been patched since.
        parameters: the names of the parameters that the rule can compute.
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
    """A decorator that registers a function as the rule of the given layer classes; see `Rule` for the arguments."""

    def register(function: RuleFunction) -> RuleFunction:
        for layer in layers:
            RULES[layer] = Rule(function, min_ndim, applies, layer.forward)
        return function

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that is exact for this layer, or None."""
    found = RULES.get(type(layer))
    if found is None or "forward" in vars(layer) or type(layer).forward is not found.forward:
        return None
    return found if found.applies(layer) else None
