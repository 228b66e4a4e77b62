"""Computes the exact importance of one batch with one forward pass and one backward pass per output.

A batch is processed in four steps:

1. `recorded_calls` puts a forward hook on every layer that has a rule. The hook stores the layer's input and inserts a
   gradient tap after its output.
2. From the autograd graph it is decided how the importance of each parameter is computed. The layer's rule computes it if the
   layer ran exactly once, with this parameter and with a dimension for the samples, and if that run is the only use of
   the parameter. If all samples share what is computed from the parameter and use it in matrix products or broadcasts, the
   rule of `shared` computes it. A parameter without any use has zero importance. The exact fallback computes all others.
3. The backward pass runs from the summed output to the taps, each of which calls the rule of its layer. The gradients of
   parameters with a rule are not requested, so autograd never forms their gradients over the batch.
4. The per-sample gradients of the fallback are checked: they must add up to the gradient that the same backward pass gave
   for the batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from mas_embed.errors import UserError
from mas_embed.importance.calls import LayerCall, calls_by_layer, recorded_calls
from mas_embed.importance.checks import check_embeddings, check_samples_are_independent
from mas_embed.importance.fallback import PerSampleGradients
from mas_embed.importance.graph import AutogradGraph
from mas_embed.importance.outputs import Output
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.rules.memory import scratch_space
from mas_embed.importance.samples import split_samples, take_samples
from mas_embed.importance.shared import SharedValue, Step, shared_value, with_ordered_samples
from mas_embed.runtime.forward import Embed, embed_batch, prepared_batch

CoverageKind = Literal["rule", "fallback", "frozen", "unused"]


@dataclass(frozen=True)
class SampleCheck:
    """What embedding few samples without the others of their batch shows.

    Attributes:
        sample_dims: the dimensions of a layer's input that may be the samples, by layer.
        signatures: the signature of the shared value of each parameter that has one, by parameter name.
    """

    sample_dims: dict[nn.Module, set[int]]
    signatures: dict[str, list[Step]]


class BatchImportance:
    """Adds up `sum_n |g_n|^exponent` over batches, for every trainable parameter; the module docstring describes the steps.

    Args:
        model: the model, in the mode in which it is to be differentiated (eval).
        output: the scalars per sample.
        exponent: 1 or 2.
        embed: how a batch is embedded, see `embed_batch`.
        may_swap_parameters: whether the parameters of the model may be replaced temporarily, as `vmap` requires. They must
            not be while other threads use the model.

    Attributes:
        sums: the sums by parameter name, in float32 or wider.
        coverage: how the importance of each parameter was computed in the last batch, by parameter name.
        norms: the norms of the embeddings, one tensor [N] per batch.
        num_samples: the number of samples added.
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
        self._sample_checks: dict[Any, SampleCheck] = {}
        self._scale, self._is_last_output = 1.0, False
        self.sums = zero_sums(trainable_parameters(model))
        self.coverage: dict[str, CoverageKind] = {}
        self.norms: list[Tensor] = []
        self.num_samples = 0

    def add(self, batch: Any) -> None:
        """Adds the samples of a batch to the sums."""
        batch = prepared_batch(self._model, batch, self._embed)
        values, tap_leaf, shared_values = self._forward(batch)
        num_samples, num_outputs = values.shape
        self._scale = 1 / num_outputs if self._output.reduction == "mean" else 1.0
        by_fallback = {
            name: self._model.get_parameter(name) for name, kind in self.coverage.items() if kind == "fallback"
        }
        nodes = list(dict.fromkeys(use.node for shared in shared_values for use in shared.uses))
        # The per-sample gradients pass once more through what lies between a shared value and the operations that use it
        passes_again = any(use.source.node is not shared.node for shared in shared_values for use in shared.uses)
        targets: list[Any] = [tap_leaf, *by_fallback.values(), *(GradientEdge(node, 0) for node in nodes)]
        for index in range(num_outputs):
            total, self._is_last_output = values[:, index].sum(), index == num_outputs - 1
            with scratch_space():
                _, *gradients = torch.autograd.grad(
                    total, targets, retain_graph=passes_again or not self._is_last_output, allow_unused=True
                )
            gradient_of_node = dict(zip(nodes, gradients[len(by_fallback) :], strict=True))
            for shared in shared_values:
                shared.add_importance(self.sums[shared.name], gradient_of_node, self._exponent, self._scale)
            if by_fallback:
                batch_gradient = dict(zip(by_fallback, gradients, strict=False))
                sums = self._fallback.sums(by_fallback, batch, num_samples, index, batch_gradient)
                for name, summed in sums.items():
                    self.sums[name].add_(summed, alpha=self._scale)
        self.num_samples += num_samples

    def coverage_of(self, batch: Any) -> dict[str, CoverageKind]:
        """How the importance of each parameter would be computed on this batch, which is not added to the sums."""
        self._forward(prepared_batch(self._model, batch, self._embed))
        return self.coverage

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor, list[SharedValue]]:
        """The outputs [N, K] of the batch, the leaf tensor through which a backward pass reaches every tap, and shared values."""
        tap_leaf = torch.zeros((), device=next(self._model.parameters()).device, requires_grad=True)
        with recorded_calls(self._model, self._add_importance, tap_leaf) as calls:
            embeddings = embed_batch(self._model, batch, self._embed)
        check_embeddings(embeddings, self._output)
        self.norms.append(embeddings.detach().norm(dim=1))
        values = self._output.values(embeddings, batch)
        if values.grad_fn is None:
            raise UserError(
                "the embeddings carry no gradient: the model detaches them or runs under no_grad; embed the batch without that"
            )
        graph = AutogradGraph(values)
        check = self._sample_check(batch, embeddings.detach(), calls)
        shared_values = self._choose_kinds(graph, calls, check, len(values))
        for call in calls:
            call.node = None  # breaks a reference cycle with the call, which only the garbage collector would free
            if not call.sums:
                call.release_input()
        return values, tap_leaf, shared_values

    def _add_importance(self, call: LayerCall, grad_output: Tensor) -> None:
        call.add_importance(grad_output, self._exponent, self._scale)
        if self._is_last_output:
            call.release_input()

    def _choose_kinds(
        self, graph: AutogradGraph, calls: list[LayerCall], check: SampleCheck, num_samples: int
    ) -> list[SharedValue]:
        """Sets `coverage` for every parameter, and for every call the `sums` that its rule adds to; returns the shared values."""
        calls_of = calls_by_layer(calls)

        def sample_dims(call: LayerCall) -> set[int]:
            """The dimensions of the input that have as many entries as there are samples, whatever their number."""
            return call.sample_dims(num_samples) & check.sample_dims.get(call.layer, set())

        def has_rule(name: str, layer: nn.Module, parameter: nn.Parameter) -> bool:
            """Whether the layer ran once, sample by sample, with this parameter, and the output depends on that run."""
            if len(calls_of[layer]) != 1:
                return False
            call = calls_of[layer][0]
            is_used = name in call.rule.parameters and call.parameters.get(name) is parameter
            num_dims = len(sample_dims(call))
            return is_used and call.node in graph and (num_dims == 1 or (num_samples == 1 and num_dims > 0))

        self.coverage = {}
        shared_values: list[SharedValue] = []
        sums_of: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
        owners = parameter_owners(self._model)
        for name, parameter in self._model.named_parameters():
            num_uses, (layer, local_name) = graph.num_uses(parameter), owners[parameter][0]
            if not parameter.requires_grad:
                self.coverage[name] = "frozen"
            elif num_uses == 0:
                self.coverage[name] = "unused"
            elif num_uses == 1 and has_rule(local_name, layer, parameter):
                self.coverage[name] = "rule"
                sums_of[layer][local_name] = self.sums[name]
            else:
                expected = check.signatures.get(name)
                shared = expected and shared_value(name, parameter, graph, calls_of[layer], num_samples, expected)
                self.coverage[name] = "rule" if shared else "fallback"
                shared_values += [shared] if shared else []
        for layer, sums in sums_of.items():
            call = calls_of[layer][0]
            call.sums, call.sample_dim = sums, min(sample_dims(call))
        return shared_values

    def _sample_check(self, batch: Any, embeddings: Tensor, calls: list[LayerCall]) -> SampleCheck:
        """Which layers have the samples in their first dimension, and which parameters give values that all samples share.

        To find them, the last and the second sample are embedded in that order as a batch of two (three times the second, if
        N = 2). Their embeddings must not change; the order also reveals sums over the preceding or following samples, and
        models that reverse the samples. This is done once for all batches whose samples have the same shapes.

        Raises:
            UserError: the embeddings change, so the samples are not independent of each other.
        """
        num_samples = len(embeddings)
        if num_samples == 1:
            return SampleCheck({call.layer: call.sample_dims(1) for call in calls}, {})
        indices = [num_samples - 1, 1] if num_samples > 2 else [1, 1, 1]
        key = (len(indices), *(tensor.shape[1:] for tensor in split_samples(batch, num_samples)[0]))
        if key not in self._sample_checks:
            self._sample_checks[key] = self._check_samples(batch, embeddings, indices)
        return self._sample_checks[key]

    def _check_samples(self, batch: Any, embeddings: Tensor, indices: list[int]) -> SampleCheck:
        """The check of `_sample_check` with the samples at `indices`."""
        tap_leaf = torch.zeros((), device=embeddings.device, requires_grad=True)
        with recorded_calls(self._model, lambda call, gradient: None, tap_leaf) as calls:
            try:
                alone = embed_batch(self._model, take_samples(batch, len(embeddings), indices), self._embed)
            except UserError as error:
                raise UserError(
                    f"the model cannot embed samples without the others of their batch: {error}"
                ) from error.__cause__
        check_samples_are_independent(alone.detach(), embeddings, indices)
        sample_dims: dict[nn.Module, set[int]] = {}
        for call in calls:
            dims = call.sample_dims(len(indices))
            sample_dims[call.layer] = sample_dims.get(call.layer, dims) & dims
        signatures = self._signatures(alone, calls, sample_dims)
        for call in calls:
            call.node = None
        return SampleCheck(sample_dims, signatures)

    def _signatures(
        self, embeddings: Tensor, calls: list[LayerCall], sample_dims: dict[nn.Module, set[int]]
    ) -> dict[str, list[Step]]:
        """The signatures of the shared values in the graph of the embeddings, by parameter name."""
        if embeddings.grad_fn is None:
            return {}
        graph, calls_of, owners = AutogradGraph(embeddings), calls_by_layer(calls), parameter_owners(self._model)
        found = []
        for name, parameter in trainable_parameters(self._model).items():
            layer, num_uses = owners[parameter][0][0], graph.num_uses(parameter)
            has_rule = bool(sample_dims.get(layer)) and calls_of[layer][0].node in graph
            if num_uses > 1 or (num_uses == 1 and not has_rule):
                found.append(shared_value(name, parameter, graph, calls_of[layer], len(embeddings)))
        values = with_ordered_samples([value for value in found if value is not None], embeddings)
        return {value.name: value.signature for value in values}


def parameter_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """For every parameter, the modules that hold it and its name in each of them; tied parameters have several."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, name))
    return owners
