"""The networks of fact learning: a shared trunk with one branch for the subject and one for predicate and object.

N images, V size of a word vector.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.models import MODELS
from mas_embed.models.embedding_net import check_sizes
from mas_embed.models.trunks import chain_of, copied, load_trunk, split_chain

# Factors on the learning rate, for weights and for biases, by prefix of parameter names; the longest matching prefix counts
Multipliers = Mapping[str, tuple[float, float]]

NEW_LAYERS_FASTER: Multipliers = {"": (1, 1), "subject.last": (10, 10), "predicate_object.last": (10, 10)}

# The factors in the release of Aljundi et al. (2018), by the form of the network
RELEASE_MULTIPLIERS: Mapping[str, Multipliers] = {
    "model_2": {
        "": (1, 2),
        "subject.last": (10, 20),
        "predicate_object.trunk": (2, 4),
        "predicate_object.trunk.classifier": (10, 20),
        "predicate_object.last": (10, 20),
    },
    "model_1": {"": (1, 4), "subject.last": (10, 20), "predicate_object.last": (10, 20)},
}


class FactNet(nn.Module):
    """Embeds images as [N, 3 V]: subject, predicate and object side by side, not normalised.

    Args:
        shared: maps images to the features that both branches take.
        subject: maps the shared features to [N, V]; its last layer is named `last`.
        predicate_object: maps the shared features to [N, 2 V]; its last layer is named `last`.
        multipliers: factors on the learning rate by prefix of parameter names, as (weights, biases); the longest matching
            prefix counts. By default the two last layers learn ten times as fast as the others. See `parameter_groups`.
    """

    def __init__(
        self,
        shared: nn.Module,
        subject: nn.Module,
        predicate_object: nn.Module,
        *,
        multipliers: Multipliers = NEW_LAYERS_FASTER,
    ) -> None:
        super().__init__()
        self.shared, self.subject, self.predicate_object = shared, subject, predicate_object
        self.multipliers = {"": (1.0, 1.0), **multipliers}

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings [N, 3 V]."""
        features = self.shared(images)
        return torch.cat([self.subject(features), self.predicate_object(features)], dim=1)

    def train(self, mode: bool = True) -> FactNet:
        """Sets the mode, but leaves shared layers whose parameters are all frozen in eval mode, so that their statistics stay."""
        super().train(mode)
        for layer in self.shared.children():
            parameters = list(layer.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                layer.eval()
        return self

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trainable parameters in groups for a torch optimizer, each with its multiple of the learning rate `lr`.

        Biases have no weight decay, as in the release of Aljundi et al. (2018).

        Examples:
            >>> net = small_fact_conv(vector_size=5)
            >>> optimizer = torch.optim.SGD(net.parameter_groups(0.01), momentum=0.9, weight_decay=5e-4)
            >>> sorted({group["weight_decay"] for group in optimizer.param_groups})
            [0.0, 0.0005]
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_bias = name.endswith("bias")
                groups.setdefault((self._multiplier(name, is_bias), is_bias), []).append(parameter)
        return [
            {"params": parameters, "lr": multiplier * lr, **({"weight_decay": 0.0} if is_bias else {})}
            for (multiplier, is_bias), parameters in groups.items()
        ]

    def _multiplier(self, name: str, is_bias: bool) -> float:
        prefix = max((prefix for prefix in self.multipliers if name.startswith(prefix)), key=len)
        return self.multipliers[prefix][is_bias]


@MODELS.register("sherlock")
def sherlock(
    *,
    vector_size: int = 300,
    form: Literal["model_2", "model_1"] = "model_2",
    weights: str = "none",
) -> FactNet:
    """The Sherlock network (Elhoseiny et al., 2017) on VGG-16, as in the release of Aljundi et al. (2018).

    "model_2" shares the layers up to the third pooling; each branch has a copy of conv4, conv5, fc6 and fc7, and both copies
    start from the same weights. "model_1" shares the layers up to fc7. The weights of the last layers are drawn from
    N(0, 0.005), their biases start at 1. The first four convolutions are frozen; the other layers learn at the multiples of
    the learning rate that the release uses.

    Args:
        vector_size: V, the size of a word vector; the data set provides it. Embeddings are [N, 3 V].
        form: "model_2" or "model_1".
        weights: of VGG-16: "none" (random), "default" (ImageNet, downloaded by torchvision), or the path of a state dict.

    Raises:
        UserError: the form is unknown, or the weights cannot be downloaded or read.
    """
    if form not in RELEASE_MULTIPLIERS:
        raise UserError(f"the form of the Sherlock network must be 'model_2' or 'model_1', got '{form}'")
    net = two_branch(
        trunk="vgg16",
        split_after="features.16" if form == "model_2" else "classifier.5",
        frozen_up_to="features.9",
        vector_size=vector_size,
        weights=weights,
    )
    net.multipliers = dict(RELEASE_MULTIPLIERS[form])
    return net


@MODELS.register("two_branch")
def two_branch(
    *,
    trunk: str = "resnet18",
    split_after: str = "layer3",
    frozen_up_to: str | None = None,
    vector_size: int = 300,
    weights: str = "none",
) -> FactNet:
    """The two-branch network on any classification network of torchvision that is a chain of layers.

    Args:
        trunk: the name of the network in torchvision.
        split_after: the last shared layer, such as "layer3" or "features.16". Both branches copy the layers after it, but
            instead of the network's last linear layer each has a new one, with weights from N(0, 0.005) and bias 1.
        frozen_up_to: the last frozen layer, which must be shared; None to freeze no layer.
        vector_size: V, the size of a word vector; the data set provides it. Embeddings are [N, 3 V].
        weights: of the trunk: "none" (random), "default" (torchvision's, downloaded), or the path of a state dict.

    Raises:
        UserError: the network or a layer is unknown, the network is not a chain of layers, or the weights cannot be downloaded
            or read.
    """
    check_sizes(vector_size=vector_size)
    layers, last = chain_of(load_trunk(trunk, weights), trunk)
    num_shared = split_chain(layers, split_after)
    num_frozen = 0 if frozen_up_to is None else split_chain(layers, frozen_up_to)
    if num_frozen > num_shared:
        raise UserError(
            f"frozen_up_to='{frozen_up_to}' comes after split_after='{split_after}'; only shared layers can be frozen"
        )
    shared = copied(dict(itertools.islice(layers.items(), num_shared)))
    for layer in shared[:num_frozen]:
        layer.requires_grad_(False)
    rest = dict(itertools.islice(layers.items(), num_shared, None))
    subject, predicate_object = (
        _branch(copied(rest), _last_layer(last.in_features, size)) for size in (vector_size, 2 * vector_size)
    )
    return FactNet(shared, subject, predicate_object)


@MODELS.register("small_fact_conv")
def small_fact_conv(
    *,
    vector_size: int = 24,
    channels: int = 1,
    width: int = 32,
    hidden: int = 256,
    dropout: float = 0.0,
    negative_slope: float = 0.0,
    last_bias: bool = True,
) -> FactNet:
    """The two-branch network for images with a height and width of 28 to 64 pixels.

    The shared part has two 3x3 convolutions, each with a 2x2 pooling. Each branch has another convolution, a pooling to 4x4, a
    hidden layer and a last layer, with weights from N(0, 0.005) and bias 0. Its parameters do not depend on the size of the
    images. No layer is pretrained, so all learn at the same rate.

    Args:
        vector_size: V, the size of a word vector; the data set provides it. Embeddings are [N, 3 V].
        channels: of the images.
        width: number of channels of the first convolution; the second has twice, those of the branches four times as many.
        hidden: size of the hidden layer.
        dropout: probability with which a unit of the hidden layer is dropped in training.
        negative_slope: of the activations, leaky ReLUs; 0 for ReLUs. A ReLU that is inactive on all images of a split gives
            its weights no importance, so a later split may change them at will and activate it on these images.
        last_bias: whether the last layers have a bias. The targets have mean zero over all facts, so a bias does not help to
            distinguish them; it shifts the embeddings of all images alike when a split is learned.

    Raises:
        UserError: a size is below 1 or above 2**31, or dropout or negative_slope is outside [0, 1).
    """
    check_sizes(vector_size=vector_size, channels=channels, width=width, hidden=hidden)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must lie in [0, 1), got {dropout}")
    if not 0 <= negative_slope < 1:
        raise UserError(f"negative_slope must lie in [0, 1), got {negative_slope}")

    def convolution(channels: int, width: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.LeakyReLU(negative_slope)

    shared = nn.Sequential(
        *(*convolution(channels, width), nn.MaxPool2d(2)), *(*convolution(width, 2 * width), nn.MaxPool2d(2))
    )

    def branch(size: int) -> nn.Sequential:
        trunk = nn.Sequential(
            *convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * width, hidden),
            nn.LeakyReLU(negative_slope),
            nn.Dropout(dropout),
        )
        return _branch(trunk, _last_layer(hidden, size, bias=0.0 if last_bias else None))

    return FactNet(shared, branch(vector_size), branch(2 * vector_size), multipliers={})


def _branch(trunk: nn.Module, last: nn.Linear) -> nn.Sequential:
    return nn.Sequential(OrderedDict(trunk=trunk, last=last))


def _last_layer(num_features: int, size: int, *, bias: float | None = 1.0) -> nn.Linear:
    """A linear layer with weights from N(0, 0.005) and all biases equal to `bias`; None for no bias."""
    layer = nn.Linear(num_features, size, bias=bias is not None)
    nn.init.normal_(layer.weight, std=0.005)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer
