"""Exact importance of one batch: one forward, one backward per scalar, and every layer call handed to its rule.

The path of a batch:

1. `_Tape` hooks every layer that has a rule; a hook keeps the layer's input and puts a `_Tap` behind its output.
2. The autograd graph is read: a parameter goes by its layer's rule if the layer ran exactly once, sample by sample, and
that
   run is the parameter's only use; with no use at all its importance is zero; everything else takes the exact fallback.
3. The backward pass runs from the summed output to the taps, each of which calls its rule. It asks for no parameter's
gradient,
   so autograd never forms the batch's weight gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.forward import Embed, embed_batch
from mas_embed.importance.fallback import PerSampleGradients, iterate_samples
from mas_embed.importance.graph import AutogradGraph
from mas_embed.importance.outputs import Output, SquaredNorm, refuse_unit_length
from mas_embed.importance.rules import Rule, rule_of

Way = Literal["rule", "fallback", "frozen", "unused"]


@dataclass
class LayerCall:
    """One call of a layer that has a rule, and what the rule needs of it."""

    layer: nn.Module
    rule: Rule
    input: Tensor
    input_version: int
    node: Any = None
    wanted: Mapping[str, Tensor] = field(default_factory=dict)  # the layer's own parameter name -> where to add its sum

    def receive(self, grad_output: Tensor, exponent: int, scale: float) -> None:
        """Adds `scale * sum_n |g_n|^exponent` of every wanted parameter to where it is wanted."""
        if not self.wanted:
            return
        if self.input._version != self.input_version:
            raise UserError(
                f"the input of a {type(self.layer).__name__} layer was modified in place after the layer used it; "
                "its gradient cannot be computed: make that operation out of place"
            )
        sums = self.rule.function(self.layer, self.input, grad_output, exponent, self.wanted.keys())
        for name, total in self.wanted.items():
            total.add_(sums[name], alpha=scale)


class BatchImportance:
    """Adds up `sum_n |g_n|^exponent` over batches, for every trainable parameter; see the module's first lines.

    Args:
        model: in the mode in which it is to be differentiated (eval).
        output: the scalars per sample.
        exponent: 1 or 2.
        embed: how a batch is embedded, see `embed_batch`.

    Attributes:
        sums: by parameter name, float32 or wider.
        ways: how each parameter of the model went in the last batch.
        num_samples: so far.
    """

    def __init__(self, model: nn.Module, *, output: Output, exponent: int, embed: Embed | str | None) -> None:
        self._model, self._output, self._exponent, self._embed = model, output, exponent, embed
        self._fallback = PerSampleGradients(model, output=output, exponent=exponent, embed=embed)
        self._samplewise_layers: set[nn.Module] | None = None
        self.sums = {
            name: torch.zeros_like(
                parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False
            )
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.ways: dict[str, Way] = {}
        self.num_samples = 0

    def add(self, batch: Any) -> None:
        """Adds a batch's samples to the sums."""
        values, anchor = self._forward(batch)
        self._scale = 1 / values.shape[1] if self._output.reduction == "mean" else 1.0
        if "rule" in self.ways.values():
            self._backward(values, anchor)
        by_fallback = [name for name, way in self.ways.items() if way == "fallback"]
        if by_fallback:
            sums = self._fallback.sums(by_fallback, batch, len(values), values.shape[1])
            for name, total in sums.items():
                self.sums[name].add_(total, alpha=self._scale)
        self.num_samples += len(values)

    def plan(self, batch: Any) -> dict[str, Way]:
        """Which way every parameter would go on this batch; adds nothing."""
        self._forward(batch)
        return self.ways

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The values [N, K] of the batch, and the anchor that a backward pass runs to."""
        anchor = torch.zeros((), device=next(self._model.parameters()).device, requires_grad=True)
        with _tape(self._model, self._receive, anchor) as calls:
            embeddings = embed_batch(self._model, batch, self._embed)
        values = self._values(embeddings, batch)
        if self._samplewise_layers is None:
            self._samplewise_layers = self._prove_samples_are_independent(batch, embeddings.detach(), calls)
        self.ways = self._plan(values, calls)
        return values, anchor

    def _values(self, embeddings: Tensor, batch: Any) -> Tensor:
        if not bool(embeddings.isfinite().all()):
            raise UserError(
                "the embeddings contain NaN or infinite values; look for such values in the inputs or the weights"
            )
        if isinstance(self._output, SquaredNorm):
            refuse_unit_length(embeddings)
        return self._output.values(embeddings, batch)

    def _receive(self, call: LayerCall, grad_output: Tensor) -> None:
        call.receive(grad_output, self._exponent, self._scale)

    def _backward(self, values: Tensor, anchor: Tensor) -> None:
        num_outputs = values.shape[1]
        for index in range(num_outputs):
            is_last = index == num_outputs - 1
            torch.autograd.grad(values[:, index].sum(), [anchor], retain_graph=not is_last, allow_unused=True)

    def _plan(self, values: Tensor, calls: list[LayerCall]) -> dict[str, Way]:
        """Which way every parameter goes, each exactly once; tells the calls what is wanted of them."""
        graph = AutogradGraph(values) if values.grad_fn is not None else None
        calls_of: dict[nn.Module, list[LayerCall]] = defaultdict(list)
        for call in calls:
            calls_of[call.layer].append(call)
        owners = parameter_owners(self._model)
        ways: dict[str, Way] = {}
        wanted: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
        for name, parameter in self._model.named_parameters():
            num_uses = graph.num_uses(parameter) if graph is not None else 0
            layer, local_name = owners[parameter][0]
            if not parameter.requires_grad:
                ways[name] = "frozen"
            elif num_uses == 0:
                ways[name] = "unused"
            elif num_uses == 1 and self._is_covered(local_name, calls_of[layer], graph, len(values)):
                ways[name] = "rule"
                wanted[layer][local_name] = self.sums[name]
            else:
                ways[name] = "fallback"
        for layer, names in wanted.items():
            calls_of[layer][0].wanted = names
        return ways

    def _is_covered(
        self, local_name: str, calls: list[LayerCall], graph: AutogradGraph | None, num_samples: int
    ) -> bool:
        """Whether the layer's rule sees the parameter's one use: one call, on the way to the output, with samples first."""
        if len(calls) != 1 or graph is None or self._samplewise_layers is None:
            return False
        call = calls[0]
        return (
            local_name in call.rule.parameters
            and call.node in graph
            and len(call.input) == num_samples
            and call.layer in self._samplewise_layers
        )

    def _prove_samples_are_independent(self, batch: Any, embeddings: Tensor, calls: list[LayerCall]) -> set[nn.Module]:
        """The layers whose first dimension is the samples: of size one where the first sample goes through alone.

        Raises:
            UserError: the first sample's embedding changes when it is embedded alone.
        """
        if len(embeddings) > 1:
            first = next(iterate_samples(batch, len(embeddings)))
            with _tape(self._model, self._receive, None) as calls:
                try:
                    alone = embed_batch(self._model, first, self._embed)
                except (RuntimeError, ValueError, IndexError) as error:
                    raise UserError(
                        f"the model cannot embed one sample without the other samples of its batch: {error}"
                    ) from error
            _refuse_coupled_samples(alone.detach(), embeddings[:1])
        return {call.layer for call in calls if len(call.input) == 1}


def parameter_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """For every parameter the modules that hold it, and its name in each; tied parameters have several."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, name))
    return owners


class _Tap(torch.autograd.Function):
    """Identity that hands its incoming gradient to a layer call; `anchor` makes every tap reachable by the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, call: LayerCall, receive: Any) -> Tensor:
        ctx.call, ctx.receive = call, receive
        # Not a view of the output: an in-place activation that follows may overwrite it.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receive(ctx.call, grad_output)
        return grad_output, None, None, None


@contextmanager
def _tape(model: nn.Module, receive: Any, anchor: Tensor | None) -> Iterator[list[LayerCall]]:
    """Records every call of a layer with a rule that is made in its body; taps the outputs if there is an anchor."""
    calls: list[LayerCall] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        rule, layer_input = rules[layer], args[0] if args else kwargs["input"]
        if layer_input.ndim < rule.min_ndim:
            return None
        call = LayerCall(layer, rule, layer_input, layer_input._version)
        calls.append(call)
        if anchor is None:
            return None
        tapped: Tensor = _Tap.apply(output, anchor, call, receive)
        call.node = tapped.grad_fn
        return tapped

    trainable = [layer for layer in model.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))]
    rules = {layer: found for layer in trainable if (found := rule_of(layer)) is not None}
    # First of all hooks, so that the output is the layer's own, before a user's hook changes it.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in rules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _refuse_coupled_samples(alone: Tensor, in_batch: Tensor) -> None:
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-2}.get(in_batch.dtype, 1e-1)
    if alone.shape != in_batch.shape or bool((alone - in_batch).norm() > tolerance * (1e-6 + in_batch.norm())):
        raise UserError(
            "a sample's embedding changes with the other samples of its batch, so it has no gradient of its own: batches "
            "must have the samples in their first dimension, and layers that use the batch's statistics must go"
        )
