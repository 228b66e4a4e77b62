"""A model that is kept alive, in one file: its weights, and everything that its method remembers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mas_embed.data import LearnedSplits, Split
from mas_embed.errors import UserError
from mas_embed.experiment.described import describe_method, describe_model, method_made_again, model_made_again
from mas_embed.methods import Method
from mas_embed.runtime.forward import check_module, unwrap_compiled
from mas_embed.runtime.state_file import read_states, write_states
from mas_embed.runtime.text import printable, shortened

KIND, VERSION = "model", 1

GivenMethod = Method | Callable[[nn.Module], Method]


class SavedModel(NamedTuple):
    """What a file of `save_model` holds; the first two are what training goes on with: `model, method, _ = load_model(path)`.

    Attributes:
        model: with its weights.
        method: of that model, with everything that it remembers.
        learned: the names of the splits that were learned and of their labels, and how images become inputs of the model.
    """

    model: nn.Module
    method: Method
    learned: LearnedSplits


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    method: Method,
    *,
    splits: Sequence[Split] = (),
    after: LearnedSplits | None = None,
) -> None:
    """Writes a model and everything that its method remembers as one safetensors file with a checksum, without pickle.

    A model that was made by name, by a config or by a function of `MODELS` such as `small_conv`, is made again by `load_model`;
    for any other one the file holds the weights only. So it is with the method: one of `METHODS` is made again if its options
    are JSON, or losses that a config names. An earlier file is replaced only by a complete one.

    Args:
        path: of the file, such as "model.safetensors".
        model: that was trained.
        method: of that model, after its last `consolidate`.
        splits: that were learned; the file then holds their names, those of their labels, and how images become inputs.
        after: the splits that were learned before these, as `load_model` gave them.

    Raises:
        UserError: the method is of another model, a state cannot be stored, or the file cannot be written.
        RunError: the disk is full.
    """
    check_module(model)
    if not isinstance(method, Method):
        raise UserError(f"save_model takes a method, such as MAS(model), got an object of type {type(method).__name__}")
    inner = unwrap_compiled(model)[0]
    if unwrap_compiled(method.model)[0] is not inner:
        raise UserError("the method was made with another model; save it with the model that it protects")
    learned = (after or LearnedSplits()).followed_by(LearnedSplits.of(splits))
    write_states(
        Path(path),
        {"model": inner.state_dict(), "method": method.state_dict()},
        kind=KIND,
        version=VERSION,
        about={"model": describe_model(inner), "method": describe_method(method), "learned": learned.as_json()},
    )


def load_model(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, method: GivenMethod | None = None
) -> SavedModel:
    """The model and the method in a file of `save_model`: training goes on with them as if it had not been interrupted.

    Args:
        path: of the file.
        model: into which the weights are loaded, on its device; None for a model that was made by name, which is made again, on
            the CPU and in eval mode.
        method: of that model, or a function that makes it of the model, as in `method=lambda model: EWC(model, loss=loss)`;
            None for one that was made with options that the file holds.

    Returns:
        Model, method, and what is known of the splits that were learned. Nothing of an argument is changed if this fails, but
        a method that was given may have lost its state.

    Raises:
        UserError: the file is missing, damaged, or of another kind or version; a model or a method must be given, or the one
            that is given is another.

    Examples:
        >>> import tempfile
        >>> from mas_embed import MAS, load_model, save_model, small_conv
        >>> model = small_conv(width=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/model.safetensors", model, MAS(model, strength=3))
        ...     model, mas, learned = load_model(f"{folder}/model.safetensors")
        >>> mas.strength
        3
    """
    source = Path(path)
    states, about = read_states(source, kind=KIND, version=VERSION, is_of="a model of save_model")
    for key in ("model", "method", "learned"):
        if not isinstance(about.get(key), dict) or not isinstance(states.get(key, {}), dict):
            raise UserError(f"{source} is damaged: it does not describe a model of save_model")
    learned = LearnedSplits.from_json(about["learned"], source=str(source))
    weights = states.get("model", {})
    if model is None:
        model = model_made_again(about["model"], source)
        _take_types(model, weights)
        model.eval()
    check_module(model)
    inner = unwrap_compiled(model)[0]
    _check_weights(inner, weights, source)
    before = {name: value.clone() for name, value in inner.state_dict().items() if isinstance(value, Tensor)}
    inner.load_state_dict(weights)
    try:
        loaded = _method_of(about["method"], model, method, source)
        loaded.load_state_dict(states["method"])
    except UserError as error:
        inner.load_state_dict(before, strict=False)
        raise UserError(str(error) if str(source) in str(error) else f"{source} cannot be loaded: {error}") from None
    return SavedModel(model, loaded, learned)


def _method_of(
    described: Mapping[str, Any],
    model: nn.Module,
    given: GivenMethod | None,
    source: Path,
) -> Method:
    """The method that is given, or else one that is made as the description says."""
    if given is None:
        return method_made_again(described, model, source)
    method = given if isinstance(given, Method) else given(model)
    if not isinstance(method, Method):
        raise UserError(
            f"method must be a method, or a function that makes one of the model, got a {type(method).__name__}"
        )
    if unwrap_compiled(method.model)[0] is not unwrap_compiled(model)[0]:
        raise UserError("the method was made with another model; make it with the model that is loaded")
    method.name = described.get("title", method.name)
    return method


def _take_types(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Gives the parameters and buffers of a model the types that the weights have, such as bfloat16."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and isinstance(weights.get(name), Tensor) and value.dtype != weights[name].dtype:
            value.data = value.data.to(weights[name].dtype)


def _check_weights(model: nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Raises `UserError` unless the weights are exactly those of the model in name, shape and type."""
    own, given = (dict(_shapes(state)) for state in (model.state_dict(), weights))
    different = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if not different:
        return
    name = different[0]
    sides = [
        f"{where} {'has no ' + name if name not in shapes else f'has it as {shapes[name]}'}"
        for where, shapes in (("the file", given), ("the model", own))
    ]
    raise UserError(
        f"{source} holds the weights of another model: {len(different)} tensors differ, such as "
        f"{shortened(printable(name), 100)} ({shortened(printable(', '.join(sides)), 200)})"
    )


def _shapes(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        yield name, f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}" if is_tensor else "no tensor"
