"""Classification networks and their weights; and networks as chains of layers that can be split between any two layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mas_embed.errors import UserError, reason_of, unknown_name
from mas_embed.models.cifar_resnet import CifarResNet
from mas_embed.runtime.modes import eval_mode
from mas_embed.runtime.reading import check_regular_file
from mas_embed.runtime.text import printable, shortened

PROBE_SIZE = 64
CIFAR_RESNETS = {"cifar_resnet20": 3, "cifar_resnet32": 5, "cifar_resnet56": 9}  # the number of blocks of a stage


_reads_weights = ContextVar("reads_weights", default=True)


@contextmanager
def without_reading_weights() -> Iterator[None]:
    """In the body, networks are made without the weights that their options name, because others are loaded afterwards."""
    token = _reads_weights.set(False)
    try:
        yield
    finally:
        _reads_weights.reset(token)


def reads_weights() -> bool:
    """Whether a network is made with the weights that its options name, see `without_reading_weights`."""
    return _reads_weights.get()


def load_trunk(name: str, weights: str) -> nn.Module:
    """A classification network of torchvision, or "cifar_resnet20".

    Args:
        name: its name in torchvision, such as "vgg16" or "resnet18"; or one of `CIFAR_RESNETS`.
        weights: "none" for the random initialisation of the network; "default" for torchvision's best weights, which are
            downloaded once; or the path of a state dict of this network, as .safetensors or as a file of `torch.save`, which
            may have been wrapped in `DataParallel`. The weights of the last layer are not used.

    Raises:
        UserError: there is no such network, or the weights cannot be downloaded, cannot be read, belong to another network, or
            are not finite.
    """
    from torchvision import models

    known = [*CIFAR_RESNETS, *models.list_models(module=models)]
    if name not in known:
        raise unknown_name("network", name, known)
    if name in CIFAR_RESNETS:
        trunk: nn.Module = CifarResNet(CIFAR_RESNETS[name])
    else:
        with warnings.catch_warnings():
            # Of how Inception and GoogLeNet will be initialised some day
            warnings.simplefilter("ignore", FutureWarning)
            trunk = models.get_model(name, weights=None)
    if not reads_weights():
        return trunk
    if weights == "default":
        load_weights(trunk, _download(name), f"torchvision's weights of {name}")
    elif weights != "none":
        load_weights(trunk, read_weights(Path(weights)), weights)
    return trunk


def chain_of(trunk: nn.Module, name: str) -> tuple[dict[str, nn.Module], nn.Linear]:
    """The layers of a network by name, in the order in which they run, without the last linear layer; and the last layer.

    Sequential modules are replaced by their layers. Pooling and flattening that the network does in its `forward`, without a
    module, are added as modules. An image of 64x64 pixels is passed through the chain and the network to check that they
    compute the same.

    Args:
        trunk: the network.
        name: the name of the network, for error messages.

    Raises:
        UserError: the network is not a chain that ends in a linear layer.
    """
    layers = _flatten_sequential(trunk, "")
    last_name = next(reversed(layers))
    last = layers.pop(last_name)
    if isinstance(last, nn.Linear):
        for bridge in ((nn.Flatten(),), (nn.AdaptiveAvgPool2d(1), nn.Flatten())):
            chain = _insert_bridge(layers, bridge)
            if _computes_the_same(trunk, nn.Sequential(*chain.values(), last)):
                return chain, last
    raise UserError(
        f"{name} is no chain of layers that could be cut in two; take one such as vgg16, resnet18, mobilenet_v2"
    )


def copied(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """A copy of layers of a chain as one sequential module, in which the layer "layer1.0" is named `layer1_0`.

    In-place layers are switched to out-of-place: an in-place layer that comes first after a split of the chain would change
    the input of the other branch.
    """
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name.replace(".", "_"), copy.deepcopy(layer))
    for module in sequence.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a plain attribute
    return sequence


def split_chain(layers: Mapping[str, nn.Module], after: str) -> int:
    """The number of layers of a chain up to and including a named layer, or up to the last layer of a named module.

    Args:
        layers: the chain, by name.
        after: the name of a layer ("features.16") or of a module that holds several ("layer3").

    Raises:
        UserError: the chain has no such layer.
    """
    names = list(layers)
    for position in reversed(range(len(names))):
        if names[position] == after or names[position].startswith(f"{after}."):
            return position + 1
    raise unknown_name("layer", after, names)


def _flatten_sequential(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The children of a module by name, with nested sequential modules replaced by their layers."""
    layers: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if type(child) is nn.Sequential:
            layers |= _flatten_sequential(child, f"{prefix}{name}.")
        else:
            layers[f"{prefix}{name}"] = child
    return layers


def _insert_bridge(layers: Mapping[str, nn.Module], bridge: tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    """The layers with a bridge from feature maps to vectors before the first linear or dropout layer, or else at the end."""
    chain: dict[str, nn.Module] = {}
    inserted = {f"bridge.{index}": module for index, module in enumerate(bridge)}
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear | nn.Dropout) and "bridge.0" not in chain:
            chain |= inserted
        chain[name] = layer
    return chain if "bridge.0" in chain else chain | inserted


def _computes_the_same(trunk: nn.Module, chain: nn.Module) -> bool:
    """Whether the chain gives the output of the network for a fixed image."""
    device = next(trunk.parameters()).device
    values = torch.linspace(-1, 1, 3 * PROBE_SIZE**2, device=device).square().reshape(1, 3, PROBE_SIZE, PROBE_SIZE)
    try:
        with torch.no_grad(), eval_mode(trunk), eval_mode(chain):
            expected, actual = trunk(values), chain(values)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return False
    return device.type == "meta" or torch.allclose(expected, actual)  # meta tensors have no values to compare


def _download(name: str) -> Mapping[str, Tensor]:
    from torchvision import models

    if name in CIFAR_RESNETS:
        raise UserError(
            f"there are no default weights of {name}; give the path of weights, such as those of "
            "https://github.com/akamaster/pytorch_resnet_cifar10, or take weights: none"
        )
    enum = models.get_model_weights(name)
    entry = enum.DEFAULT
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no internet connection, a full disk, or a wrong checksum
        raise UserError(
            f"the weights of {name} cannot be downloaded ({reason_of(error)}); get {entry.url} elsewhere and give its path "
            "as weights, or take weights: none"
        ) from None


def read_weights(path: Path, *, remedy: str = "give 'none', 'default' or a state dict") -> Mapping[str, Tensor]:
    """A state dict from a .safetensors file or a file of `torch.save`, of which nothing but tensors is read.

    Args:
        path: of the file.
        remedy: the end of the message about a file that cannot be read.

    Raises:
        UserError: the file cannot be read, or holds no state dict.
    """
    check_regular_file(path, "weights from")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file one of many kinds
        reason = getattr(error, "strerror", None) or "it holds more than tensors, or is damaged"
        raise UserError(f"cannot read weights from {path}: {reason}; {remedy}") from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} holds no state dict of tensors; save model.state_dict()")
    if state and all(name.startswith("module.") for name in state):  # saved inside a DataParallel
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def last_linear(network: nn.Module) -> str:
    """The name of the last linear layer, which of a classification network computes the scores; "" if there is none."""
    return next(reversed([name for name, module in network.named_modules() if isinstance(module, nn.Linear)]), "")


def load_weights(trunk: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Loads the weights of all layers but the last linear one, which is not used; it may have another size in the state.

    Raises:
        UserError: the state is of another network, or holds a tensor that cannot be used; the message names `source`.
    """
    _load_checked(trunk, state, source, skipped=last_linear(trunk))


def load_model_weights(model: nn.Module, path: Path) -> None:
    """Loads the state dict of a whole embedding model, its head included; every name and shape must be that of the model.

    Args:
        model: that is changed.
        path: of a .safetensors file, or of a file of `torch.save`.

    Raises:
        UserError: the file cannot be read, or is the state of another model, or holds a tensor that cannot be used. The model
            is then unchanged.
    """
    state = read_weights(path, remedy="give a state dict, as model.state_dict() is")
    _load_checked(model, state, str(path), skipped=None)


def _load_checked(network: nn.Module, state: Mapping[str, Any], source: str, *, skipped: str | None) -> None:
    """Loads a state of exactly the network's tensors, without those of the layer that is skipped."""
    current = network.state_dict()
    wanted = {name: value.shape for name, value in current.items() if name.rpartition(".")[0] != skipped}
    for name in [name for name in wanted if name.endswith("num_batches_tracked") and name not in state]:
        del wanted[name]  # weights of before torch 0.4.1 have no such count, which the running statistics do not need
    given = {name: value.shape for name, value in state.items() if name.rpartition(".")[0] != skipped}
    different = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if different:
        raise UserError(
            f"{source} has the weights of another network: {len(different)} tensors differ in name or shape, as "
            f"{shortened(printable(different[0]))}"
        )
    for name in wanted:
        problem = _problem_of(state[name], current[name])
        if problem:
            raise UserError(f"the weights {source} cannot be used: the tensor {name} {problem}")
    network.load_state_dict({**current, **{name: state[name] for name in wanted}})


def _problem_of(given: Tensor, expected: Tensor) -> str:
    """Why a tensor cannot take the place of the expected one of the same shape; "" if it can."""
    if given.is_meta:
        return "has no values (it is on the device 'meta')"
    if given.layout != torch.strided or given.is_quantized or given.is_floating_point() != expected.is_floating_point():
        kind = "sparse" if given.layout != torch.strided else str(given.dtype).removeprefix("torch.")
        return f"is {kind}, but it must be dense and {str(expected.dtype).removeprefix('torch.')}"
    return "" if bool(given.to(expected.dtype).isfinite().all()) else "has values that are not finite"
