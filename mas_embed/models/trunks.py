"""torchvision's networks as chains of layers that can be cut at any place, and their weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.modes import eval_mode

PROBE_SIZE = 64


def load_trunk(name: str, weights: str) -> nn.Module:
    """A classification network of torchvision.

    Args:
        name: as torchvision has it, "vgg16" or "resnet18".
        weights: "none" for the network's own random initialisation; "default" for torchvision's best weights, which are
            downloaded once; or a file of weights for this network, .safetensors or what `torch.save` wrote of a state dict.
            Those of its last layer are not used.

    Raises:
        UserError: there is no such network, its weights cannot be downloaded or read, or are those of another network.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("network of torchvision", name, known)
    trunk: nn.Module = models.get_model(name, weights=None)
    if weights == "default":
        _load_state(trunk, _download(name), f"torchvision's weights of {name}")
    elif weights != "none":
        _load_state(trunk, _read_state(Path(weights)), weights)
    return trunk


def chain_of(trunk: nn.Module, name: str) -> tuple[dict[str, nn.Module], nn.Linear]:
    """The layers of a network one after another by name, without the last linear layer; and that layer.

    Sequential modules are opened; what the network does between its layers without a module (pooling, flattening) gets one.
    That the chain computes what the network computes is tried on an image of 64x64 pixels.

    Raises:
        UserError: the network is no chain that ends in a linear layer.
    """
    layers = _opened(trunk, "")
    last_name = next(reversed(layers))
    last = layers.pop(last_name)
    if isinstance(last, nn.Linear):
        for bridge in ((nn.Flatten(),), (nn.AdaptiveAvgPool2d(1), nn.Flatten())):
            chain = _bridged(layers, bridge)
            if _is_same(trunk, nn.Sequential(*chain.values(), last)):
                return chain, last
    raise UserError(
        f"{name} is no chain of layers that could be cut in two; take one such as vgg16, resnet18, mobilenet_v2"
    )


def copied(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """A copy of some layers of a chain as one module, "layer1.0" under the name `layer1_0`; nothing works in place.

    An in-place layer that comes first after a cut would change what the other branch is given.
    """
    sequence = nn.Sequential()
    for name, layer in layers.items():
        sequence.add_module(name.replace(".", "_"), copy.deepcopy(layer))
    for module in sequence.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a bool of the module's own
    return sequence


def split_chain(layers: Mapping[str, nn.Module], after: str) -> int:
    """How many layers of a chain end with the one that is named, or with the last of the module that is named.

    Raises:
        UserError: there is no layer of that name.
    """
    names = list(layers)
    for position in reversed(range(len(names))):
        if names[position] == after or names[position].startswith(f"{after}."):
            return position + 1
    raise unknown_name("layer", after, names)


def _opened(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if type(child) is nn.Sequential:
            layers |= _opened(child, f"{prefix}{name}.")
        else:
            layers[f"{prefix}{name}"] = child
    return layers


def _bridged(layers: Mapping[str, nn.Module], bridge: tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    """The layers with a bridge from images to vectors before the first linear layer, or else at the end."""
    chain: dict[str, nn.Module] = {}
    inserted = {f"bridge.{index}": module for index, module in enumerate(bridge)}
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear | nn.Dropout) and "bridge.0" not in chain:
            chain |= inserted
        chain[name] = layer
    return chain if "bridge.0" in chain else chain | inserted


def _is_same(trunk: nn.Module, chain: nn.Module) -> bool:
    device = next(trunk.parameters()).device
    values = torch.linspace(-1, 1, 3 * PROBE_SIZE**2, device=device).square().reshape(1, 3, PROBE_SIZE, PROBE_SIZE)
    try:
        with torch.no_grad(), eval_mode(trunk), eval_mode(chain):
            expected, found = trunk(values), chain(values)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return device.type == "meta" or torch.allclose(expected, found)  # tensors without values have a shape to compare


def _download(name: str) -> Mapping[str, Tensor]:
    from torchvision import models

    enum = models.get_model_weights(name)
    entry = enum.DEFAULT
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong checksum
        raise UserError(
            f"the weights of {name} cannot be downloaded ({error}); get {entry.url} elsewhere and give its path as weights, "
            "or take weights: none"
        ) from None


def _read_state(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "it holds more than tensors, or is damaged"
        raise UserError(f"cannot read weights from {path}: {reason}; give 'none', 'default' or a state dict") from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; save model.state_dict()")
    return state


def _load_state(trunk: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Loads everything but the last layer, which is not used."""
    own = trunk.state_dict()
    last = next(reversed([name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]), "")
    wanted = {name: value.shape for name, value in own.items() if name.rpartition(".")[0] != last}
    given = {name: value.shape for name, value in state.items() if name.rpartition(".")[0] != last}
    different = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if different:
        raise UserError(
            f"{source} has the weights of another network: {len(different)} tensors differ in name or shape, as {different[0]}"
        )
    trunk.load_state_dict({**own, **{name: state[name] for name in wanted}})
