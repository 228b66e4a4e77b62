"""Class statistics, a rehearsal method that stores a Gaussian for every class of the earlier splits and samples from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mas_embed.errors import UserError, unknown_name
from mas_embed.importance.parameters import trainable_parameters
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_share, inputs_and_labels
from mas_embed.methods.parameter_tensors import copy_to_parameters, write_to_parameters
from mas_embed.methods.rehearsal import num_rehearsed, rehearsal_generator
from mas_embed.runtime.checks import check_at_least
from mas_embed.runtime.distributed import own_share, size_of_whole_batch
from mas_embed.runtime.forward import Embed, batch_to, check_embed, device_of, embed_batch, is_texts, map_tensors
from mas_embed.runtime.modes import eval_mode, eval_mode_with_grad


@METHODS.register("class_statistics")
class ClassStatistics(Method):
    """Extends every batch by features drawn from Gaussians of the classes of earlier splits; stores no samples.

    When a split ends, the mean, the `rank` principal directions of variance and the range of each feature are stored for
    every class. Features are either the inputs of the model or the outputs of an inner `layer`. From the second split on,
    features `f = m + e R / sqrt(n - 1)`, clipped to the range of their class, are appended to every batch. Here m is the mean
    of the n samples of the class, R [r, F] satisfies `R^T R = sum_n (x_n - m)(x_n - m)^T` (up to the `rank`), and e [r] is
    standard normal. The miner and the loss treat the drawn items like the others, so that classes are pushed apart that never
    occur in one batch of samples.

    With an inner layer, all parameters that feed the layer are held constant from the end of the first split on, because the
    stored statistics would otherwise become outdated. Choose a layer whose features are also good enough for later splits,
    such as the output of a pretrained trunk. If a class occurs in several splits, one Gaussian describes all its samples.

    Although no samples are stored, features of a class can be drawn from the stored statistics, and the mean and range of its
    inputs can be inspected directly. Choose an inner layer if this reveals too much of the data.

    F is the number of features of a sample. A class needs memory for `(rank + 3) F` numbers, at most `(min(n, F) + 3) F`. The
    end of a split costs O(n F min(n, F)) per class, with all its features in memory. A batch costs a forward and backward pass
    of the drawn features through the layers above.

    Args:
        model: the embedding model that is trained.
        layer: the name of the submodule whose outputs are the features, as in `model.get_submodule(layer)`. It must be called
            once per forward pass and return a tensor [N, ...]. "" takes the inputs, which must be one floating-point tensor.
        rank: the number of directions of variance that are stored for a class, >= 0; None stores the whole covariance.
        share: the share of drawn items in an extended batch, from 0 to below 1.
        seed: of the draws.
        embed: replaces `model(inputs)` for the outputs of the layer and the embeddings of drawn features, see `MAS`. It must
            compute what the model computes in training.

    Attributes:
        classes: the Gaussians by class.
        held: the constant values of the parameters that feed the layer, by name; empty without a layer.
        shape: the shape of the features of one sample.
        num_splits: the number of splits that were consolidated.

    Raises:
        UserError: the layer does not exist or an option is not accepted; or, from `consolidate`, batches have no labels,
            features are not floating-point, a parameter that feeds the layer also reaches the embeddings around it, or a batch
            normalisation whose statistics change in training feeds the layer.

    Source: Shin et al., *Continual Learning with Deep Generative Replay*, NeurIPS 2017, and Liu et al., *Generative Feature
        Replay for Class-Incremental Learning*, CVPR workshops 2020, use networks as generators. Zhu et al., *Prototype
        Augmentation and Self-Supervision for Incremental Learning* (PASS), CVPR 2021, draw from Gaussians around class means at
        the last layer of a classifier. Here the features are drawn for a loss over pairs, before the layers that are trained.
    """

    keeps = "statistics"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: str = "",
        rank: int | None = None,
        share: float = 0.5,
        seed: int = 0,
        embed: Embed | str | None = None,
    ) -> None:
        super().__init__(model)
        layers = dict(model.named_modules())
        if layer not in layers:
            raise unknown_name("layer of the model", layer, [name for name in layers if name])
        if rank is not None:
            check_at_least("rank", rank, 0)
        check_share(share)
        check_embed(model, embed)
        self.layer, self.rank, self.share, self.seed, self.embed = layer, rank, share, seed, embed
        self.classes: dict[int, ClassGaussian] = {}
        self.held: dict[str, Tensor] = {}
        self.shape: tuple[int, ...] = ()
        self.num_splits = self._num_draws = 0
        self._placeholder: Any = None

    @property
    def batch_hooks(self) -> frozenset[str]:
        """Both hooks that extend a batch; without a layer only `extend_batch`."""
        return super().batch_hooks if self.layer else frozenset({"extend_batch"})

    @property
    def is_exact_in_processes(self) -> bool:
        """True: all processes draw the same features for a batch that they share, and each adds its share."""
        return True

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch with drawn inputs appended, if the statistics are those of the inputs."""
        if self.layer:
            is_text = is_texts(inputs)
            self._placeholder = inputs[:2] if is_text else map_tensors(lambda part: torch.zeros_like(part[:2]), inputs)
            return inputs, labels
        drawn = self._draw(labels)
        return inputs if drawn is None else torch.cat([inputs, drawn[0]]), _extend_labels(labels, drawn)

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings with those of drawn features appended, if the statistics are those of an inner layer."""
        drawn = self._draw(labels) if self.layer else None
        if drawn is None or len(drawn[0]) == 0:
            return embeddings, labels
        # The placeholder has no effect on the embeddings, because the output of the layer is replaced
        with _replaced_output(self.model.get_submodule(self.layer), drawn[0]):
            drawn_embeddings = embed_batch(self.model, self._placeholder, self.embed)
        return torch.cat([embeddings, drawn_embeddings]), _extend_labels(labels, drawn)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Resets the parameters that feed the layer to their values at the end of the first split."""
        write_to_parameters(self.model, self.held)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: stores the statistics of its classes.

        Args:
            batches: pairs `(inputs, labels)`.
        """
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            inputs, batch_labels = inputs_and_labels(
                batch_to(batch, device_of(self.model)), "class_statistics fits a Gaussian to every class"
            )
            if self.layer and self.num_splits == 0 and not features:
                names = _names_feeding(self.model, self.layer, inputs, self.embed)
                self.held = {name: self.model.get_parameter(name).detach().clone() for name in names}
            features.append(self._features(inputs))
            labels.append(batch_labels)
        self._update_classes(torch.cat(features), torch.cat(labels))
        self.num_splits += 1

    def _state(self) -> dict[str, Any]:
        """The attributes `classes`, `shape`, `held` and `num_splits`, and the number of random draws."""
        return {
            "classes": {str(label): dict(vars(gaussian)) for label, gaussian in self.classes.items()},
            "shape": torch.tensor(self.shape, dtype=torch.long),
            "held": dict(self.held),
            "num_splits": self.num_splits,
            "num_draws": self._num_draws,
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: the state belongs to a model whose parameters have other names or shapes.
        """
        device = device_of(self.model)
        self.classes = {
            int(label): ClassGaussian(**{name: _copy_to(value, device) for name, value in gaussian.items()})
            for label, gaussian in state["classes"].items()
        }
        self.held = copy_to_parameters(self.model, state["held"])
        self.shape = tuple(state["shape"].tolist())
        self.num_splits, self._num_draws = int(state["num_splits"]), int(state["num_draws"])

    def _draw(self, labels: Tensor) -> tuple[Tensor, list[int]] | None:
        """Drawn features and their labels for a batch with the given labels, with equally many of each class; None for none."""
        num_drawn = num_rehearsed(size_of_whole_batch(len(labels)), self.share)
        if num_drawn == 0 or not self.classes:
            return None
        generator = rehearsal_generator(self.seed, self.num_splits, self._num_draws)
        self._num_draws += 1
        known = sorted(self.classes)
        order = [known[index] for index in torch.randperm(len(known), generator=generator).tolist()]
        counts = {label: len(range(position, num_drawn, len(order))) for position, label in enumerate(order)}
        drawn = [self.classes[label].draw(count, generator) for label, count in counts.items()]
        features = torch.cat(drawn).reshape(num_drawn, *self.shape)
        own = own_share(num_drawn)
        return features[own], [label for label, count in counts.items() for _ in range(count)][own]

    def _features(self, inputs: Any) -> Tensor:
        """The outputs [N, ...] of the layer in eval mode, or the inputs if there is no layer."""
        features = inputs
        if self.layer:
            with torch.no_grad(), eval_mode(self.model):
                features = _layer_output(self.model, self.layer, inputs, self.embed)[0]
        if not isinstance(features, Tensor) or not features.is_floating_point():
            source = f"the output of layer '{self.layer}' is" if self.layer else "the inputs are"
            raise UserError(f"class_statistics needs a floating-point tensor, but {source} not; choose another layer")
        return features.detach()

    def _update_classes(self, features: Tensor, labels: Tensor) -> None:
        """Updates the Gaussians of the classes with features [N, ...] and labels [N]."""
        shape = tuple(features.shape[1:])
        if self.classes and shape != self.shape:
            raise UserError(
                f"features have shape {list(shape)}, but had {list(self.shape)} in earlier splits; all must have the same shape"
            )
        self.shape = shape
        for label in labels.unique().tolist():
            new = ClassGaussian.from_samples(features[labels == label].flatten(1), rank=self.rank)
            old = self.classes.get(label)
            self.classes[label] = new if old is None else old.merged_with(new, rank=self.rank)


@dataclass(frozen=True)
class ClassGaussian:
    """A Gaussian of the samples of a class, with F features.

    Attributes:
        count: n, the number of samples.
        mean: m [F], the mean of the samples.
        root: R [r, F], a square root of the scatter matrix, `R^T R = sum_n (x_n - m)(x_n - m)^T`; only the r principal
            directions of the scatter matrix if the rank is limited.
        low: the smallest value of each feature, [F].
        high: the largest value of each feature, [F].
    """

    count: int
    mean: Tensor
    root: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def from_samples(cls, features: Tensor, *, rank: int | None = None) -> ClassGaussian:
        """The Gaussian of samples [N, F], with at most `rank` directions; None for all directions."""
        exact = features.double()
        mean = exact.mean(dim=0)
        root = _principal_directions(exact - mean, rank)
        return cls(len(features), mean.to(features), root.to(features), features.amin(0), features.amax(0))

    def merged_with(self, other: ClassGaussian, *, rank: int | None = None) -> ClassGaussian:
        """The Gaussian of the samples of both; exact if no rank was limited (Chan, Golub, LeVeque, 1979)."""
        count = self.count + other.count
        difference = other.mean.double() - self.mean.double()
        between = math.sqrt(self.count * other.count / count) * difference
        rows = torch.cat([self.root.double(), other.root.double(), between[None]])
        return ClassGaussian(
            count,
            (self.mean.double() + difference * (other.count / count)).to(self.mean),
            _principal_directions(rows, rank).to(self.root),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Random samples [num, F], clipped to the range of the class."""
        noise = torch.randn(num, len(self.root), generator=generator, dtype=torch.float64).to(self.root)
        samples = self.mean + noise @ self.root / math.sqrt(max(self.count - 1, 1))
        return samples.clamp(self.low, self.high)


def _extend_labels(labels: Tensor, drawn: tuple[Tensor, list[int]] | None) -> Tensor:
    return labels if drawn is None else torch.cat([labels, labels.new_tensor(drawn[1])])


def _principal_directions(rows: Tensor, rank: int | None) -> Tensor:
    """The matrix R [r, F] with at most `rank` rows whose `R^T R` is closest to `rows^T rows` (Eckart and Young, 1936)."""
    _, lengths, directions = torch.linalg.svd(rows, full_matrices=False)
    return (lengths[:, None] * directions)[:rank].contiguous()


def _layer_output(model: nn.Module, layer: str, inputs: Any, embed: Embed | str | None) -> tuple[Any, Tensor]:
    """The output of a layer in a forward pass of the model, and the embeddings.

    Raises:
        UserError: the forward pass does not call the layer exactly once.
    """
    outputs: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        embeddings = embed_batch(model, inputs, embed)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise UserError(
            f"layer '{layer}' is called {len(outputs)} times in a forward pass; choose one that is called once"
        )
    return outputs[0], embeddings


@contextmanager
def _replaced_output(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Replaces the output of a module in the body of the `with` statement."""
    handle = module.register_forward_hook(lambda module, args, original: output)
    try:
        yield
    finally:
        handle.remove()


def _names_feeding(model: nn.Module, layer: str, inputs: Any, embed: Embed | str | None) -> list[str]:
    """The names of the trainable parameters that the output of a layer depends on, found by automatic differentiation.

    Raises:
        UserError: the embeddings depend on one of them along a path around the layer, or one belongs to a batch normalisation,
            whose running statistics change in training.
    """
    parameters = trainable_parameters(model)
    with eval_mode_with_grad(model):
        output, _ = _layer_output(model, layer, inputs, embed)
        feeding = _names_with_gradient(output, parameters)
        with _replaced_output(model.get_submodule(layer), output.detach().requires_grad_()):
            around = feeding & _names_with_gradient(embed_batch(model, inputs, embed), parameters)
        model.train()  # until the context ends
        changing = {name for name, module in model.named_modules() if isinstance(module, _NormBase) and module.training}
    if around:
        raise UserError(
            f"'{min(around)}' feeds layer '{layer}' and also reaches the embeddings around it; choose another layer"
        )
    for name in sorted(feeding):
        if name.rpartition(".")[0] in changing:
            raise UserError(
                f"batch normalisation '{name}' feeds layer '{layer}', and its statistics change in training; freeze it, for a "
                "backbone with frozen_batch_norm=True"
            )
    return sorted(feeding)


def _names_with_gradient(output: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The names of the parameters that an output depends on."""
    if not output.requires_grad:
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _copy_to(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
