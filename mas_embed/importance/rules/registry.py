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
        num_feature_dims: of a layer that treats all positions alike, the number of trailing dimensions that are not positions;
            the samples may then be in any of the others. None if they must be in the first.
        parameters: the names of the parameters that the rule can compute.
    """

    function: RuleFunction
    min_ndim: int
    applies: Callable[[Any], bool]
    forward: Callable[..., Any]
    num_feature_dims: Callable[[Any], int] | None = None
    parameters: tuple[str, ...] = ("weight", "bias")

    def sample_dims(self, layer: nn.Module, input: Tensor, num_samples: int) -> set[int]:
        """The dimensions of an input that may be the samples: those of size N, of which the rule accepts any."""
        num_dims = input.ndim - self.num_feature_dims(layer) if self.num_feature_dims else 1
        return {dim for dim in range(num_dims) if input.shape[dim] == num_samples}


RULES: dict[type[nn.Module], Rule] = {}


def rule(
    *layers: type[nn.Module],
    min_ndim: int,
    applies: Callable[[Any], bool] = lambda layer: True,
    num_feature_dims: Callable[[Any], int] | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """A decorator that registers a function as the rule of the given layer classes; see `Rule` for the arguments."""

    def register(function: RuleFunction) -> RuleFunction:
        for layer in layers:
            RULES[layer] = Rule(function, min_ndim, applies, layer.forward, num_feature_dims)
        return function

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that is exact for this layer, or None."""
    found = RULES.get(type(layer))
    if found is None or "forward" in vars(layer) or type(layer).forward is not found.forward:
        return None
    return found if found.applies(layer) else None
