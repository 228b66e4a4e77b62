"""Exact importance of one batch: one forward, one backward per scalar, and every layer call handed to its rule.

The path of a batch:

1. `_tape` hooks every layer that has a rule; a hook keeps the layer's input and puts a `_Tap` behind its output.
2. The autograd graph is read: a parameter goes by its layer's rule if the layer ran exactly once, with this parameter and
   sample by sample, and that run is the parameter's only use; with no use at all its importance is zero; everything else
   takes the exact fallback.
3. The backward pass runs from the summed output to the taps, each of which calls its rule. It asks for the gradient of no
   parameter with a rule, so autograd never forms the batch's weight gradients.
4. The fallback's per-sample gradients must add up to the gradient of the batch that the same backward pass gave.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import check_embeddings, check_samples_are_independent
from mas_embed.importance.fallback import PerSampleGradients, split_samples, take_samples
from mas_embed.importance.graph import AutogradGraph
from mas_embed.importance.outputs import Output
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.rules import Rule, rule_of
from mas_embed.importance.rules.memory import scratch_space
from mas_embed.runtime.forward import Embed, embed_batch

CoverageKind = Literal["rule", "fallback", "frozen", "unused"]


@dataclass
class LayerCall:
    """One call of a layer that has a rule, and what the rule needs of it."""

    layer: nn.Module
    rule: Rule
    input: Tensor
    input_version: int
    parameters: dict[str, nn.Parameter | None]
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

    def release(self) -> None:
        """Lets go of the input, which nothing needs any more."""
        self.input = self.input.new_empty(0)


class BatchImportance:
    """Adds up `sum_n |g_n|^exponent` over batches, for every trainable parameter; see the module's first lines.

    Args:
        model: in the mode in which it is to be differentiated (eval).
        output: the scalars per sample.
        exponent: 1 or 2.
        embed: how a batch is embedded, see `embed_batch`.
        may_swap_parameters: whether the model's parameters may be others for a moment, which `vmap` needs; not while other
            threads use the model.

    Attributes:
        sums: by parameter name, float32 or wider.
        coverage: how the importance of each parameter of the model was computed in the last batch.
        lengths: of the embeddings, [N] a batch.
        num_samples: so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: Output,
        exponent: int,
        embed: Embed | str | None,
        may_swap_parameters: bool = True,
    ) -> None:
        self._model, self._output, self._exponent, self._embed = model, output, exponent, embed
        self._fallback = PerSampleGradients(model, output=output, exponent=exponent, embed=embed)
        self._fallback.is_vectorized &= may_swap_parameters
        self._proofs: dict[Any, set[nn.Module]] = {}
        self._scale, self._is_last_output = 1.0, False
        self.sums = zero_sums(trainable_parameters(model))
        self.coverage: dict[str, CoverageKind] = {}
        self.lengths: list[Tensor] = []
        self.num_samples = 0

    def add(self, batch: Any) -> None:
        """Adds a batch's samples to the sums."""
        values, anchor = self._forward(batch)
        num_samples, num_outputs = values.shape
        self._scale = 1 / num_outputs if self._output.reduction == "mean" else 1.0
        parameters = dict(self._model.named_parameters())
        by_fallback = {name: parameters[name] for name, kind in self.coverage.items() if kind == "fallback"}
        for index in range(num_outputs):
            total, self._is_last_output = values[:, index].sum(), index == num_outputs - 1
            with scratch_space():
                _, *gradients = torch.autograd.grad(
                    total, [anchor, *by_fallback.values()], retain_graph=not self._is_last_output, allow_unused=True
                )
            if by_fallback:
                batch_gradient = dict(zip(by_fallback, gradients, strict=True))
                sums = self._fallback.sums(by_fallback, batch, num_samples, index, batch_gradient)
                for name, summed in sums.items():
                    self.sums[name].add_(summed, alpha=self._scale)
        self.num_samples += num_samples

    def plan(self, batch: Any) -> dict[str, CoverageKind]:
        """How the importance of every parameter would be computed on this batch; adds nothing."""
        self._forward(batch)
        return self.coverage

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The values [N, K] of the batch, and the anchor that a backward pass runs to."""
        anchor = torch.zeros((), device=next(self._model.parameters()).device, requires_grad=True)
        with _tape(self._model, self._receive, anchor) as calls:
            embeddings = embed_batch(self._model, batch, self._embed)
        check_embeddings(embeddings, self._output)
        self.lengths.append(embeddings.detach().norm(dim=1))
        values = self._output.values(embeddings, batch)
        if values.grad_fn is None:
            raise UserError(
                "the embeddings carry no gradient: the model detaches them, or runs under no_grad; embed without that"
            )
        graph = AutogradGraph(values)
        samplewise_layers = self._prove_samples_are_independent(batch, embeddings.detach(), calls)
        self._plan(graph, calls, samplewise_layers, len(values))
        for call in calls:
            call.node = None  # which refers to the call: memory that only the garbage collector would free
            if not call.wanted:
                call.release()
        return values, anchor

    def _receive(self, call: LayerCall, grad_output: Tensor) -> None:
        call.receive(grad_output, self._exponent, self._scale)
        if self._is_last_output:
            call.release()

    def _plan(
        self, graph: AutogradGraph, calls: list[LayerCall], samplewise_layers: set[nn.Module], num_samples: int
    ) -> None:
        """Decides how the importance of every parameter is computed, and tells each call which parameters its rule serves."""
        calls_of: dict[nn.Module, list[LayerCall]] = defaultdict(list)
        for call in calls:
            calls_of[call.layer].append(call)

        def covering_call(name: str, layer: nn.Module, parameter: nn.Parameter) -> LayerCall | None:
            """The one call of the layer, if its rule sees this parameter, on the way to the output, with samples first."""
            if len(calls_of[layer]) != 1 or layer not in samplewise_layers:
                return None
            call = calls_of[layer][0]
            is_seen = name in call.rule.parameters and call.parameters.get(name) is parameter
            return call if is_seen and call.node in graph and len(call.input) == num_samples else None

        self.coverage = {}
        wanted: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
        owners = parameter_owners(self._model)
        for name, parameter in self._model.named_parameters():
            num_uses, (layer, local_name) = graph.num_uses(parameter), owners[parameter][0]
            if not parameter.requires_grad:
                self.coverage[name] = "frozen"
            elif num_uses == 0:
                self.coverage[name] = "unused"
            elif num_uses == 1 and covering_call(local_name, layer, parameter) is not None:
                self.coverage[name] = "rule"
                wanted[layer][local_name] = self.sums[name]
            else:
                self.coverage[name] = "fallback"
        for layer, names in wanted.items():
            calls_of[layer][0].wanted = names

    def _prove_samples_are_independent(self, batch: Any, embeddings: Tensor, calls: list[LayerCall]) -> set[nn.Module]:
        """The layers whose first dimension is the samples: of as many as go through.

        The last and the second sample are embedded without the others, in that order (sums over the samples before or
        after, and a reversed order, would show); once for all batches of samples of one shape.

        Raises:
            UserError: their embeddings change.
        """
        num_samples = len(embeddings)
        if num_samples == 1:
            return {call.layer for call in calls if len(call.input) == 1}
        few = [num_samples - 1, 1] if num_samples > 2 else [1]
        key = (len(few), *(tensor.shape[1:] for tensor in split_samples(batch, num_samples)[0]))
        if key not in self._proofs:
            with _tape(self._model, self._receive, None) as calls:
                try:
                    alone = embed_batch(self._model, take_samples(batch, num_samples, few), self._embed).detach()
                except (RuntimeError, ValueError, IndexError) as error:
                    raise UserError(
                        f"the model cannot embed samples without the others of their batch: {error}"
                    ) from error
            check_samples_are_independent(alone, embeddings, few)
            seen = {call.layer for call in calls}
            self._proofs[key] = seen - {call.layer for call in calls if len(call.input) != len(few)}
        return self._proofs[key]


def parameter_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """For every parameter the modules that hold it, and its name in each; tied parameters have several."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, name))
    return owners


class _Tap(torch.autograd.Function):
    """Identity that hands its incoming gradient to a layer call; `anchor` lets a backward pass reach every tap."""

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
    own_thread = threading.get_ident()

    def record(layer: nn.Module, *call_of_layer: Any) -> Tensor | None:
        if threading.get_ident() != own_thread:
            # Another thread serves with the same model; it may have looked the hook up before torch knew of its keywords
            return None
        args, kwargs, output = call_of_layer
        rule, layer_input = rules[layer], args[0] if args else kwargs["input"]
        if layer_input.ndim < rule.min_ndim:
            return None
        call = LayerCall(layer, rule, layer_input, layer_input._version, dict(layer._parameters))
        calls.append(call)
        if anchor is None:
            return None
        tapped: Tensor = _Tap.apply(output, anchor, call, receive)
        call.node = tapped.grad_fn
        return tapped

    rules = {layer: found for layer in _trainable_layers(model) if (found := rule_of(layer)) is not None}
    # First of all hooks, so that the output is the layer's own, before a user's hook changes it.
    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in rules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _trainable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with trainable parameters of their own; none while hooks for all modules run before any of a layer."""
    if torch.nn.modules.module._global_forward_hooks:
        return []
    return [layer for layer in model.modules() if any(p.requires_grad for p in layer.parameters(recurse=False))]
