"""Embedding networks on the classification networks of torchvision and timm, pretrained or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from mas_embed.errors import UserError, reason_of, unknown_name
from mas_embed.models.embedding_net import MODELS, EmbeddingNet, check_sizes
from mas_embed.models.preprocessing import PREPROCESSING
from mas_embed.models.trunks import CIFAR_RESNETS, last_linear, load_trunk, load_weights, read_weights, reads_weights
from mas_embed.runtime.checks import as_number, check_choice
from mas_embed.runtime.libraries import require_library
from mas_embed.runtime.preprocessing import IMAGENET, Preprocessing

TIMM = "timm/"  # with which the names of timm's networks begin
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Backbone(EmbeddingNet):
    """An embedding network on a pretrained trunk, of which a part may be frozen and the rest may learn more slowly.

    Args:
        trunk: maps images [N, 3, H, W] to pooled features [N, F].
        head: maps features [N, F] to embeddings [N, D].
        is_normalized: whether embeddings have unit length.
        trunk_learning_rate: multiple of the learning rate at which the trunk learns.
        frozen_batch_norm: whether the batch norm of the trunk keeps its running statistics, and uses them in training too.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: nn.Module,
        *,
        is_normalized: bool = True,
        trunk_learning_rate: float = 1.0,
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__(trunk, head, is_normalized=is_normalized)
        self.trunk_learning_rate, self.frozen_batch_norm = trunk_learning_rate, frozen_batch_norm

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode; batch norm that is frozen, or whose parameters are, stays in eval mode, so that its statistics stay."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, _BATCH_NORM):
                parameters = list(module.parameters())
                is_frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
                if self.frozen_batch_norm or is_frozen:
                    module.eval()
        return self

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trainable parameters for a torch optimizer: of the trunk, at its multiple of the learning rate, and of the head."""
        rates = ((self.trunk, self.trunk_learning_rate * lr), (self.head, lr))
        groups = [
            {"params": [parameter for parameter in part.parameters() if parameter.requires_grad], "lr": rate}
            for part, rate in rates
        ]
        return [group for group in groups if group["params"]]


@MODELS.register("backbone")
def backbone(
    *,
    network: str = "resnet18",
    weights: str = "default",
    embedding_size: int = 128,
    head: Literal["linear", "mlp", "none"] = "linear",
    is_normalized: bool = True,
    trunk_learning_rate: float = 1.0,
    frozen_up_to: str | None = None,
    frozen_batch_norm: bool = False,
) -> Backbone:
    """A network of torchvision or timm without its last layer, and an embedding head.

    The running statistics of batch norm are no parameters. No method protects them, and training on a new split replaces
    those of the old ones: they forget too. With `frozen_batch_norm` they stay as they are in the weights.

    Args:
        network: the name of a classification network in torchvision, such as "resnet50"; of one in timm after "timm/", such as
            "timm/vit_small_patch16_224"; or "cifar_resnet20", for images of about 32x32 pixels.
        weights: "default" for the library's pretrained weights, which are downloaded once; "none" for random ones; or the path
            of a state dict of the network, as .safetensors or as a file of `torch.save`. The last layer is not loaded, so
            weights of a classifier of any number of classes fit.
        embedding_size: D, the size of the embeddings; without a head that of the features, whatever is given.
        head: "linear" for one linear layer; "mlp" for two with a ReLU between them, the first as wide as the features; "none"
            for the pooled features themselves.
        is_normalized: whether embeddings have unit length; `embed: unnormalized` of a method takes them before that.
        trunk_learning_rate: multiple of the learning rate at which the trunk learns; the head learns at the rate itself.
        frozen_up_to: the name of a module of the trunk, such as "layer2"; its parameters and those that the network defines
            before them are frozen, and so are their batch norms. None to freeze nothing.
        frozen_batch_norm: whether all batch norms of the trunk keep their running statistics, and use them in training too.

    Raises:
        UserError: there is no such network or module; timm is not installed; the network does not end in a linear layer; or
            the weights cannot be downloaded or read, or are of another network.

    Examples:
        >>> import torch
        >>> model = backbone(network="cifar_resnet20", weights="none", embedding_size=16)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """
    check_sizes(embedding_size=embedding_size)
    check_choice("head", head, ("linear", "mlp", "none"))
    if not as_number("trunk_learning_rate", trunk_learning_rate) >= 0:
        raise UserError(f"trunk_learning_rate must be at least 0, got {trunk_learning_rate}")
    if network.startswith(TIMM):
        trunk, num_features = _timm_trunk(network.removeprefix(TIMM), weights)
    else:
        trunk, num_features = _torchvision_trunk(network, weights)
    if frozen_up_to is not None:
        _freeze(trunk, frozen_up_to)
    return Backbone(
        trunk,
        _head(head, num_features, embedding_size),
        is_normalized=is_normalized,
        trunk_learning_rate=trunk_learning_rate,
        frozen_batch_norm=frozen_batch_norm,
    )


@PREPROCESSING.register("backbone")
def colours_of_weights(*, network: str, weights: str) -> Preprocessing | None:
    """Mean and standard deviation of the colours that the weights of a network were trained with; None without weights.

    Weights from a file are taken to want what the library's own weights of the network want.
    """
    if weights == "none":
        return None
    if network.startswith(TIMM):
        timm = require_library("timm", extra="timm")
        cfg = timm.get_pretrained_cfg(network.removeprefix(TIMM), allow_unregistered=True)
        return IMAGENET if cfg is None else Preprocessing(tuple(cfg.mean), tuple(cfg.std))
    if network in CIFAR_RESNETS:
        return IMAGENET
    from torchvision import models

    known = models.list_models(module=models)
    if network not in known:
        raise unknown_name("network", network, [*CIFAR_RESNETS, *known])
    transforms = models.get_model_weights(network).DEFAULT.transforms()
    return Preprocessing(tuple(transforms.mean), tuple(transforms.std))


def _torchvision_trunk(name: str, weights: str) -> tuple[nn.Module, int]:
    """A network without its last linear layer, and the size of its features."""
    trunk = load_trunk(name, weights)
    if getattr(trunk, "aux_logits", False):  # of Inception and GoogLeNet, which are for training the classifier
        trunk.aux_logits = False  # type: ignore[assignment]  # a plain attribute
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(trunk, auxiliary):
                setattr(trunk, auxiliary, None)
        trunk.transform_input = weights != "none"  # type: ignore[assignment]  # as torchvision's own loader sets it
    last_name = last_linear(trunk)
    parent_name, _, own_name = last_name.rpartition(".")
    last = trunk.get_submodule(last_name)
    if not isinstance(last, nn.Linear):
        raise UserError(f"{name} does not end in a linear layer, so it has no pooled features; take another network")
    setattr(trunk.get_submodule(parent_name), own_name, nn.Identity())
    return trunk, last.in_features


def _timm_trunk(name: str, weights: str) -> tuple[nn.Module, int]:
    """A network of timm without its classifier, and the size of its features."""
    timm = require_library("timm", extra="timm")
    if not timm.is_model(name):
        raise unknown_name("network of timm", name, timm.list_models())
    try:
        trunk = timm.create_model(name, pretrained=weights == "default" and reads_weights())
    except Exception as error:  # no internet connection, no weights, a full disk
        raise UserError(
            f"the network {name} of timm cannot be made with its weights ({reason_of(error)}); give the path of weights, or take "
            "weights: none"
        ) from error
    if weights not in ("default", "none") and reads_weights():
        load_weights(trunk, read_weights(Path(weights)), weights)
    trunk.reset_classifier(0)
    return trunk, trunk.num_features if not hasattr(trunk, "head_hidden_size") else trunk.head_hidden_size


def _head(kind: str, num_features: int, embedding_size: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "mlp":
        return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, embedding_size))
    return nn.Linear(num_features, embedding_size)


def _freeze(trunk: nn.Module, name: str) -> None:
    """Freezes the parameters of a module and those that the trunk defines before them."""
    parameters = list(trunk.named_parameters())
    inside = [position for position, (key, _) in enumerate(parameters) if key.startswith(f"{name}.")]
    if not inside:
        with_parameters = [
            key for key, module in trunk.named_modules() if key and any(True for _ in module.parameters())
        ]
        raise unknown_name("module of the trunk", name, with_parameters)
    for _, parameter in parameters[: inside[-1] + 1]:
        parameter.requires_grad_(False)
