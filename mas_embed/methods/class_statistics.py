"""Class statistics: what the classes of earlier splits looked like is remembered as Gaussians, and trained on again."""

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
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_share, inputs_and_labels
from mas_embed.methods.parameter_tensors import copy_to_parameters
from mas_embed.methods.rehearsal import num_rehearsed, rehearsal_generator
from mas_embed.runtime.forward import batch_to, device_of, embed_batch, map_tensors
from mas_embed.runtime.modes import eval_mode, eval_mode_with_grad


@METHODS.register("class_statistics")
class ClassStatistics(Method):
    """Every batch is extended by features drawn from a Gaussian of every class of the earlier splits; no sample is kept.

    When a split ends, of every class the mean, the `rank` main directions of variance and the range of each feature are
    remembered, at a place in the network where they stay true: at the inputs, or behind an inner `layer`. From the second
    split on, every batch is extended by features `f = m + e R / sqrt(n - 1)`, clipped to their class's range: m is the mean
    of its n samples, R [r, F] with `R^T R = sum_n (x_n - m)(x_n - m)^T` (up to `rank`), and e [r] standard normal. The miner
    and the loss see both as one, so that classes that never meet in a batch are pushed apart.

    Behind an inner layer, everything that feeds the layer is held as it is when the first split ends: else what is
    remembered would become false while it is in use. Choose a layer whose features suffice for what comes, such
    as that behind a pretrained trunk. A class that is seen again has its samples of all splits in one Gaussian.

    No sample is kept, but what is kept of a class can be drawn from, and at the inputs its mean and its range can be looked
    at: where that is too much, take an inner layer.

    F is the size of a sample at that place. A class costs `(rank + 3) F` numbers, at most `(min(n, F) + 3) F`; the end of a
    split O(n F min(n, F)) a class, all its features in memory; a batch a pass of the drawn features through the layers above.

    Args:
        model: the embedding model that is trained.
        layer: the name of the submodule behind which statistics are taken, as in `model.get_submodule(layer)`; a tensor,
            samples first, must come out of it, once in every pass. "" for the inputs, which must be one tensor of floats.
        rank: how many directions of variance of a class are kept, >= 0; None for all, the whole covariance.
        share: of the samples that are trained on, how many are drawn ones, from 0 to below 1.
        seed: of the draws; processes draw differently.

    Raises:
        UserError: there is no such layer; or from `consolidate`, batches have no labels, features are no floats, something
            reaches the embeddings around the layer, or batch normalisation feeds it.

    Source: Shin et al., *Continual Learning with Deep Generative Replay*, NeurIPS 2017, and Liu et al., *Generative Feature
        Replay for Class-Incremental Learning*, CVPR workshops 2020, whose generators are networks, and Zhu et al., *Prototype
        Augmentation and Self-Supervision for Incremental Learning* (PASS), CVPR 2021, who draw from Gaussians around class
        means at the last layer, for a classifier; here for a loss over pairs, before the layers that are trained.
    """

    keeps = "statistics"

    def __init__(
        self, model: nn.Module, *, layer: str = "", rank: int | None = None, share: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__(model)
        layers = dict(model.named_modules())
        if layer not in layers:
            raise unknown_name("layer of the model", layer, [name for name in layers if name])
        if rank is not None and rank < 0:
            raise UserError(f"rank must be at least 0, got {rank}")
        check_share(share)
        self.layer, self.rank, self.share, self.seed = layer, rank, share, seed
        self.classes: dict[int, ClassGaussian] = {}
        self.held: dict[str, Tensor] = {}
        self.shape: tuple[int, ...] = ()
        self.num_splits = self._num_draws = 0
        self._blank: Any = None

    def extend_batch(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The batch with drawn inputs behind it, where statistics are those of the inputs."""
        if self.layer:
            self._blank = map_tensors(lambda tensor: torch.zeros_like(tensor[:2]), inputs)
            return inputs, labels
        drawn = self._draw(labels)
        return inputs if drawn is None else torch.cat([inputs, drawn[0]]), self._labels(labels, drawn)

    def extend_embeddings(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings with those of drawn features behind them, where statistics are those of an inner layer."""
        drawn = self._draw(labels) if self.layer else None
        if drawn is None:
            return embeddings, labels
        # What is handed to the model comes as far as the layer only, whose output is replaced
        with replaced_output(self.model.get_submodule(self.layer), drawn[0]):
            embedded = embed_batch(self.model, self._blank)
        return torch.cat([embeddings, embedded]), self._labels(labels, drawn)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts what feeds the layer back where it was when the first split ended."""
        own = dict(self.model.named_parameters())
        for name, value in self.held.items():
            own[name].copy_(value)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: remembers its classes.

        Args:
            batches: `(inputs, labels)` each.
        """
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            inputs, of_batch = inputs_and_labels(
                batch_to(batch, device_of(self.model)), "the statistics are of classes"
            )
            if self.layer and self.num_splits == 0 and not features:
                names = names_before(self.model, self.layer, inputs)
                self.held = {name: self.model.get_parameter(name).detach().clone() for name in names}
            features.append(self._features(inputs))
            labels.append(of_batch)
        self._remember(torch.cat(features), torch.cat(labels))
        self.num_splits += 1

    def state_dict(self) -> dict[str, Any]:
        """The Gaussians by class, the shape of what they are of, what is held, and where the random draws stand."""
        return {
            "classes": {str(label): dict(vars(gaussian)) for label, gaussian in self.classes.items()},
            "shape": torch.tensor(self.shape, dtype=torch.long),
            "held": dict(self.held),
            "num_splits": self.num_splits,
            "num_draws": self._num_draws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, see `Method.load_state_dict`."""
        self._check_state(state)
        device = device_of(self.model)
        self.classes = {
            int(label): ClassGaussian(**{name: _copied(value, device) for name, value in gaussian.items()})
            for label, gaussian in state["classes"].items()
        }
        self.held = copy_to_parameters(self.model, state["held"])
        self.shape = tuple(state["shape"].tolist())
        self.num_splits, self._num_draws = int(state["num_splits"]), int(state["num_draws"])

    def _draw(self, labels: Tensor) -> tuple[Tensor, list[int]] | None:
        """Features for a batch with these labels and the class of each, every class as often as the others; or none."""
        wanted = num_rehearsed(len(labels), self.share)
        if wanted == 0 or not self.classes:
            return None
        generator = rehearsal_generator(self.seed, self.num_splits, self._num_draws)
        self._num_draws += 1
        known = sorted(self.classes)
        turns = [known[index] for index in torch.randperm(len(known), generator=generator).tolist()]
        counts = {label: len(range(place, wanted, len(turns))) for place, label in enumerate(turns)}
        drawn = [self.classes[label].draw(count, generator) for label, count in counts.items()]
        features = torch.cat(drawn).reshape(wanted, *self.shape)
        return features, [label for label, count in counts.items() for _ in range(count)]

    def _labels(self, labels: Tensor, drawn: tuple[Tensor, list[int]] | None) -> Tensor:
        return labels if drawn is None else torch.cat([labels, labels.new_tensor(drawn[1])])

    def _features(self, inputs: Any) -> Tensor:
        """What comes out of the layer in eval mode, or the inputs: [N, ...]."""
        features = inputs
        if self.layer:
            with torch.no_grad(), eval_mode(self.model):
                features = output_of(self.model, self.layer, inputs)[0]
        if not isinstance(features, Tensor) or not features.is_floating_point():
            where = f"come out of '{self.layer}'" if self.layer else "go into the model; name a layer"
            raise UserError(f"class statistics are of a tensor of floats, which does not {where}")
        return features.detach()

    def _remember(self, features: Tensor, labels: Tensor) -> None:
        shape = tuple(features.shape[1:])
        if self.classes and shape != self.shape:
            raise UserError(
                f"features have shape {list(shape)} but {list(self.shape)} in earlier splits; give all one shape"
            )
        self.shape = shape
        for label in labels.unique().tolist():
            new = ClassGaussian.of(features[labels == label].flatten(1), rank=self.rank)
            old = self.classes.get(label)
            self.classes[label] = new if old is None else old.merged(new, rank=self.rank)


@dataclass(frozen=True)
class ClassGaussian:
    """A class as a Gaussian: what was the mean, the spread and the range of its samples. F features.

    Attributes:
        count: n, of samples.
        mean: [F].
        root: R [r, F]: `R^T R` is the scatter `sum_n (x_n - m)(x_n - m)^T`, its main r directions if it is cut.
        low: the least value of each feature, [F].
        high: the greatest.
    """

    count: int
    mean: Tensor
    root: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor, *, rank: int | None = None) -> ClassGaussian:
        """That of samples [N, F]."""
        exact = features.double()
        mean = exact.mean(dim=0)
        root = main_directions(exact - mean, rank)
        return cls(len(features), mean.to(features), root.to(features), features.amin(0), features.amax(0))

    def merged(self, other: ClassGaussian, *, rank: int | None = None) -> ClassGaussian:
        """That of both's samples; exact where neither is cut (Chan, Golub, LeVeque, 1979)."""
        count = self.count + other.count
        apart = other.mean.double() - self.mean.double()
        between = math.sqrt(self.count * other.count / count) * apart
        rows = torch.cat([self.root.double(), other.root.double(), between[None]])
        return ClassGaussian(
            count,
            (self.mean.double() + apart * (other.count / count)).to(self.mean),
            main_directions(rows, rank).to(self.root),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Samples [num, F], clipped to the class's range."""
        noise = torch.randn(num, len(self.root), generator=generator, dtype=torch.float64).to(self.root)
        samples = self.mean + noise @ self.root / math.sqrt(max(self.count - 1, 1))
        return samples.clamp(self.low, self.high)


def main_directions(rows: Tensor, rank: int | None) -> Tensor:
    """The R of at most `rank` rows whose `R^T R` is nearest to `rows^T rows` (Eckart and Young, 1936); [r, F]."""
    _, lengths, directions = torch.linalg.svd(rows, full_matrices=False)
    return (lengths[:, None] * directions)[:rank].contiguous()


def output_of(model: nn.Module, layer: str, inputs: Any) -> tuple[Any, Tensor]:
    """What comes out of a layer on the way, and the embeddings.

    Raises:
        UserError: the layer is not called exactly once.
    """
    outputs: list[Any] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        embeddings = embed_batch(model, inputs)
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise UserError(f"layer '{layer}' is called {len(outputs)} times in a pass of the model; take one called once")
    return outputs[0], embeddings


@contextmanager
def replaced_output(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Runs its body with something else coming out of a module."""
    handle = module.register_forward_hook(lambda module, given, own: output)
    try:
        yield
    finally:
        handle.remove()


def names_before(model: nn.Module, layer: str, inputs: Any) -> list[str]:
    """The names of the parameters that feed a layer, read from the autograd graph.

    Raises:
        UserError: one of them reaches the embeddings around the layer, or is of a batch normalisation whose running
            statistics move on.
    """
    own = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    with eval_mode_with_grad(model):
        output, _ = output_of(model, layer, inputs)
        before = _reached(output, trained)
        with replaced_output(model.get_submodule(layer), output.detach().requires_grad_()):
            around = before & _reached(embed_batch(model, inputs), trained)
    if around:
        raise UserError(
            f"'{min(around)}' feeds layer '{layer}' and reaches the embeddings around it; take another layer"
        )
    for name in sorted(before):
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _NormBase):
            raise UserError(f"batch normalisation '{name}' feeds layer '{layer}' and moves on in training; freeze it")
    return sorted(before)


def _reached(output: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    if not output.requires_grad:
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
