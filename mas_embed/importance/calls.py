"""Records the calls of layers that have a rule, and taps the gradients of their outputs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.rules import Rule, rule_of


@dataclass
class LayerCall:
    """One call of a layer that has a rule, with the data that the rule needs.

    Attributes:
        layer: the layer that was called.
        rule: its rule.
        input: of the call.
        input_version: the version counter of `input` at the call, which reveals in-place changes after it.
        parameters: the parameters of the layer at the call, by their names within the layer.
        node: the autograd node of the tap after the layer's output.
        sample_dim: the dimension of the samples in the input and the output.
        sums: for each parameter whose importance this call computes, by its name within the layer, the tensor to add to.
    """

    layer: nn.Module
    rule: Rule
    input: Tensor
    input_version: int
    parameters: dict[str, nn.Parameter | None]
    node: Any = None
    sample_dim: int = 0
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def add_importance(self, grad_output: Tensor, exponent: int, scale: float) -> None:
        """Adds `scale * sum_n |g_n|^exponent` of every parameter in `sums` to its tensor.

        Raises:
            UserError: the input was modified in place after the call.
        """
        if not self.sums:
            return
        if self.is_input_modified:
            raise UserError(
                f"the input of a {type(self.layer).__name__} layer was modified in place after the layer used it; "
                "the gradients of its parameters cannot be computed; use an out-of-place operation instead"
            )
        layer_input, delta = (tensor.movedim(self.sample_dim, 0) for tensor in (self.input, grad_output))
        batch_sums = self.rule.function(self.layer, layer_input, delta, exponent, self.sums.keys())
        for name, total in self.sums.items():
            total.add_(batch_sums[name], alpha=scale)

    def sample_dims(self, num_samples: int) -> set[int]:
        """The dimensions of the input that may be the samples, see `Rule.sample_dims`."""
        return self.rule.sample_dims(self.layer, self.input, num_samples)

    @property
    def is_input_modified(self) -> bool:
        """Whether the input was modified in place after the call."""
        return self.input._version != self.input_version

    def release_input(self) -> None:
        """Drops the reference to the input, so that its memory can be freed."""
        self.input = self.input.new_empty(0)


def calls_by_layer(calls: Iterable[LayerCall]) -> dict[nn.Module, list[LayerCall]]:
    """The calls of every layer, in their order."""
    calls_of: dict[nn.Module, list[LayerCall]] = defaultdict(list)
    for call in calls:
        calls_of[call.layer].append(call)
    return calls_of


class _GradientTap(torch.autograd.Function):
    """Identity that passes its incoming gradient to `add_importance`; `tap_leaf` lets a backward pass reach every tap."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, tap_leaf: Tensor, call: LayerCall, add_importance: Any) -> Tensor:
        ctx.call, ctx.add_importance = call, add_importance
        # The result must not be a view of the output, because an in-place activation may overwrite it.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.add_importance(ctx.call, grad_output)
        return grad_output, None, None, None


@contextmanager
def recorded_calls(model: nn.Module, add_importance: Any, tap_leaf: Tensor) -> Iterator[list[LayerCall]]:
    """Records every call, within the context, of a layer with a rule, and inserts a gradient tap after it."""
    calls: list[LayerCall] = []
    recording_thread = threading.get_ident()

    def record(layer: nn.Module, *call_of_layer: Any) -> Tensor | None:
        if threading.get_ident() != recording_thread:
            # Another thread is using the model; it may have looked up the hook before torch registered it as taking keywords
            return None
        args, kwargs, output = call_of_layer
        rule, layer_input = rules[layer], args[0] if args else kwargs["input"]
        if layer_input.is_inference():
            raise UserError(
                "the model runs in inference mode, in which autograd records nothing; embed the batch without "
                "torch.inference_mode (a SentenceTransformer: with embed='sentence_transformers', not with 'encode')"
            )
        if layer_input.ndim < rule.min_ndim:
            return None
        call = LayerCall(layer, rule, layer_input, layer_input._version, dict(layer._parameters))
        calls.append(call)
        tapped: Tensor = _GradientTap.apply(output, tap_leaf, call, add_importance)
        call.node = tapped.grad_fn
        return tapped

    rules = {layer: found for layer in _trainable_layers(model) if (found := rule_of(layer)) is not None}
    # The hook runs before all others, so that it gets the output of the layer itself and not one that a user's hook changed.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in rules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _trainable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that hold a trainable parameter; none if global forward hooks exist, as these run before a layer's hooks."""
    if torch.nn.modules.module._global_forward_hooks:
        return []
    return [
        layer for layer in model.modules() if any(p is not None and p.requires_grad for p in layer._parameters.values())
    ]
