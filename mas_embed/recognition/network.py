"""The model multi_head: a shared trunk, and for every split a linear layer that scores its classes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.models import MODELS, PREPROCESSING, Backbone, EmbeddingNet, preprocessing_of
from mas_embed.recognition.heads import check_classes_per_split
from mas_embed.runtime.checks import shown
from mas_embed.runtime.preprocessing import Preprocessing


class ClassHeads(nn.ModuleList):
    """The heads of a classification network: for every split a linear layer from features [N, F] to the scores of its classes."""

    def forward(self, features: Tensor) -> Tensor:
        """The class scores [N, C] of all heads side by side."""
        return torch.cat([head(features) for head in self], dim=1)


class MultiHeadNet(Backbone):
    """A classification network with one head for every split on a shared trunk.

    A sample has gradients in the head of its own split only (see `MultiHeadCrossEntropy`). The heads of the other splits then
    stay as they are, to the bit, under every optimizer of torch that does not move parameters whose gradients are zero: that
    is all of them but ASGD, because the heads are trained without weight decay.

    Args:
        trunk: maps inputs to features [N, F].
        head: maps features to the scores of all classes [N, C].
        trunk_learning_rate: multiple of the learning rate at which the trunk learns.
        frozen_batch_norm: whether the batch norm of the trunk keeps its running statistics, and uses them in training too.
    """

    def __init__(
        self, trunk: nn.Module, head: ClassHeads, *, trunk_learning_rate: float = 1.0, frozen_batch_norm: bool = False
    ) -> None:
        super().__init__(
            trunk,
            head,
            is_normalized=False,
            trunk_learning_rate=trunk_learning_rate,
            frozen_batch_norm=frozen_batch_norm,
        )

    def features(self, inputs: Tensor) -> Tensor:
        """The output [N, F] of the trunk. With `embed: features`, methods measure and protect the trunk alone."""
        return self.trunk(inputs)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trainable parameters for a torch optimizer: of the trunk, and of the heads without weight decay.

        A head whose gradient is zero would otherwise shrink while other splits are trained.
        """
        heads = {id(parameter) for parameter in self.head.parameters()}
        return [
            {**group, "weight_decay": 0.0} if id(group["params"][0]) in heads else group
            for group in super().parameter_groups(lr)
        ]


@MODELS.register("multi_head")
def multi_head(*, trunk: Mapping[str, Any] | str, classes_per_split: Sequence[int]) -> MultiHeadNet:
    """A trunk with one linear head for every split; the model gives the scores of all heads side by side.

    Args:
        trunk: an embedding network by name, or with its options: `{name: small_conv, channels: 3, width: 32}`, or
            `{name: backbone, network: cifar_resnet20, weights: none}`. Its embedding head is left out: the heads of the splits
            stand on the pooled features of its trunk. Its other options, such as `trunk_learning_rate` or `frozen_up_to`,
            hold here too.
        classes_per_split: the number of classes of each split, in order; the data set provides it.

    Raises:
        UserError: there is no such network, it refuses its options, or it has no trunk; there is no split, or a split has no
            class.

    Examples:
        >>> model = multi_head(trunk={"name": "small_conv", "width": 4}, classes_per_split=[2, 3])
        >>> images = torch.zeros(7, 1, 8, 8)
        >>> model(images).shape, model.features(images).shape
        (torch.Size([7, 5]), torch.Size([7, 16]))
    """
    counts = check_classes_per_split(classes_per_split)
    options = {"name": trunk} if isinstance(trunk, str) else dict(trunk)
    if not isinstance(options.get("name"), str):
        raise UserError(f"trunk needs a name, as in trunk: {{name: small_conv, channels: 3}}, got {shown(trunk)}")
    name = options.pop("name")
    try:
        network = MODELS[name](**options)
    except TypeError as error:  # an option that the network does not have, or one that it needs
        raise UserError(f"trunk: {error}") from None
    if not isinstance(network, EmbeddingNet) or type(network).forward is not EmbeddingNet.forward:
        raise UserError(f"the trunk must be an embedding network with a trunk and a head, such as backbone, not {name}")
    first = next((module for module in network.head.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise UserError(
            "the number of the trunk's features is that of its head's inputs; leave out the trunk's option head"
        )
    return MultiHeadNet(
        network.trunk,
        ClassHeads(nn.Linear(first.in_features, number) for number in counts),
        trunk_learning_rate=getattr(network, "trunk_learning_rate", 1.0),
        frozen_batch_norm=getattr(network, "frozen_batch_norm", False),
    )


def head_scores(scores: Tensor, classes_per_split: Sequence[int], num_heads: int) -> list[Tensor]:
    """The class scores [N, c] of each of the first heads, from those of all heads [N, C]."""
    ends = list(itertools.accumulate(classes_per_split[:num_heads], initial=0))
    return [scores[:, start:end] for start, end in itertools.pairwise(ends)]


@PREPROCESSING.register("multi_head")
def colours_of_trunk(*, trunk: Mapping[str, Any] | str) -> Preprocessing | None:
    """Mean and standard deviation of the colours that the trunk's weights were trained with; None without such weights."""
    options = {"name": trunk} if isinstance(trunk, str) else dict(trunk)
    name = options.pop("name", None)
    return preprocessing_of(name, options) if isinstance(name, str) and name in MODELS else None
