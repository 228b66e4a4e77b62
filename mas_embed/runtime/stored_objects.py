"""The state of objects of other libraries, such as losses, miners and optimizers, as tensors and JSON, without pickle.

A state is what `flatten_state` takes. Objects are not made anew from it: `restore` changes an object of the same kind, made
as the first one was, until it has the same state.
"""

from __future__ import annotations

import enum
import random
import re
import types
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mas_embed.errors import UserError, reason_of

_PLAIN = (bool, int, float, str, type(None))
_CONSTANTS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    enum.Enum,
    re.Pattern,
    PurePath,
    torch.dtype,
    torch.device,
)
_LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque, "size": torch.Size}
_MISSING = object()
_ATTRIBUTES = "__dict__"
_HEAP_TYPE = 1 << 9  # the flag of classes that are defined in Python, whose objects have no hidden state


def state_of(value: Any) -> Any:
    """The state of an object: of its tensors, arrays, numbers, texts, random generators, containers and inner objects.

    Functions, classes and the like are taken to be constant.

    Raises:
        UserError: the object holds something whose state cannot be seen, such as an iterator.
    """
    return _state(value, "", {}, [])


def restore(value: Any, state: Any, device: torch.device | str = "cpu") -> Any:
    """Takes an object to a state: changes it in place where it can be changed, and returns what has the state.

    Args:
        value: an object that was made as the one of the state.
        state: from `state_of`.
        device: for tensors that were not on the CPU and that the object does not have yet.

    Raises:
        UserError: the state is of an object of another kind, or damaged.
    """
    try:
        return _restored(value, state, "", {}, torch.device(device))
    except UserError:
        raise
    except Exception as error:  # whatever a state of another form leads to
        raise UserError(f"the state is of another object, or damaged: {reason_of(error)}") from error


def _state(value: Any, path: str, seen: dict[int, str], held: list[Any]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, _CONSTANTS):
        return {"kind": "constant"}
    if id(value) in seen:
        return {"kind": "same", "as": seen[id(value)]}
    seen[id(value)] = path
    held.append(value)  # so that no other object gets its id

    def inner(part: Any, name: str) -> Any:
        return _state(part, f"{path}.{name}" if path else name, seen, held)

    if isinstance(value, Tensor) and value.layout == torch.strided:
        is_on_cpu, is_parameter = value.device.type == "cpu", isinstance(value, nn.Parameter)
        return {"kind": "tensor", "value": value.detach(), "on_cpu": is_on_cpu, "is_parameter": is_parameter}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return {"kind": "array", "value": torch.from_numpy(np.array(value)), "is_scalar": isinstance(value, np.generic)}
    if isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
        return {"kind": "generator", "value": inner(_generator_state(value), "state")}
    if type(value) in _LISTS.values():
        kind = next(name for name, one in _LISTS.items() if one is type(value))
        return {"kind": kind, **_items_state(list(value), inner)}
    if isinstance(value, dict) and all(type(key) in _PLAIN for key in value):
        return {"kind": "dict", "keys": list(value), **_items_state(list(value.values()), inner, list(value))}
    if isinstance(value, types.MethodType | partial):
        return {"kind": "parts", **_items_state(_parts(value), inner)}
    if _is_transparent(value):
        return {"kind": "object", "class": type(value).__qualname__, "attributes": inner(vars(value), _ATTRIBUTES)}
    name = path.replace(f"{_ATTRIBUTES}.", "")
    raise UserError(
        f"{repr(name) if name else 'it'} is an object of type {type(value).__name__}, whose state cannot be stored"
    )


def _items_state(items: list[Any], inner: Callable[[Any, str], Any], names: list[Any] | None = None) -> dict[str, Any]:
    """The states of items: one JSON list if all are plain."""
    if all(type(item) in _PLAIN for item in items):
        return {"items": items}
    names = list(range(len(items))) if names is None else names
    states = {str(index): inner(item, str(names[index])) for index, item in enumerate(items)}
    return {"number": len(items), "states": states}


def _restored(old: Any, state: Any, path: str, done: dict[str, Any], device: torch.device) -> Any:
    if not isinstance(state, Mapping):
        return state
    kind = state["kind"]
    if kind == "same":
        return done[state["as"]]
    if kind == "constant" or (kind == "object" and not _is_of_class(old, state["class"])):
        if old is _MISSING or kind == "object":
            raise UserError(f"'{path}' was an object, which cannot be made from a state")
        return old
    if kind in ("object", "parts"):
        done[path] = old  # before what is in it, which may refer to it

    def inner(old_part: Any, part: Any, name: str) -> Any:
        return _restored(old_part, part, f"{path}.{name}" if path else name, done, device)

    if kind == "object":
        inner(vars(old), state["attributes"], _ATTRIBUTES)
        value = old
    elif kind == "parts":
        _restored_items(_parts(old), state, inner)
        value = old
    elif kind == "tensor":
        value = _restored_tensor(old, state, path, device)
    elif kind == "array":
        array = state["value"].numpy().copy()
        value = array[()] if state["is_scalar"] else array
    elif kind == "generator":
        value = _set_generator(old, inner(_MISSING, state["value"], "state"))
    elif kind == "dict":
        keys, value = state["keys"], old if isinstance(old, dict) else {}
        items = _restored_items([value.get(key, _MISSING) for key in keys], state, inner, keys)
        value.clear()
        value.update(zip(keys, items, strict=True))
    else:
        olds = list(old) if isinstance(old, list | tuple | deque) else []
        value = _refilled(old, _LISTS[kind], _restored_items(olds, state, inner))
    done[path] = value
    return value


def _restored_items(
    olds: list[Any], state: Mapping[str, Any], inner: Callable[[Any, Any, str], Any], names: list[Any] | None = None
) -> list[Any]:
    if "items" in state:
        return list(state["items"])
    number, states = int(state["number"]), state.get("states", {})
    names = list(range(number)) if names is None else names
    olds = [*olds, *[_MISSING] * (number - len(olds))]
    return [inner(olds[index], states[str(index)], str(names[index])) for index in range(number)]


def _refilled(old: Any, kind: type, items: list[Any]) -> Any:
    """A list or the like with the items; the old object, which others may hold, if it can be changed."""
    if kind in (list, deque) and type(old) is kind:
        old.clear()
        old.extend(items)
        return old
    return kind(items)


def _restored_tensor(old: Any, state: Mapping[str, Any], path: str, device: torch.device) -> Tensor:
    stored: Tensor = state["value"]
    if isinstance(old, Tensor) and (old.shape, old.dtype) == (stored.shape, stored.dtype):
        with torch.no_grad():
            return old.copy_(stored)
    if state["is_parameter"]:
        raise UserError(f"'{path}' is no parameter of shape {list(stored.shape)} here")
    return stored.to("cpu" if state["on_cpu"] else device, copy=True)


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _set_generator(generator: Any, state: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        raise UserError("a random generator cannot be made from a state")
    return generator


def _parts(value: Any) -> list[Any]:
    """What a bound method or a partial function holds."""
    if isinstance(value, types.MethodType):
        return [value.__self__]
    return [value.func, *value.args, *value.keywords.values()]


def _is_transparent(value: Any) -> bool:
    """Whether all of an object's state is in its `__dict__`."""
    bases = type(value).__mro__[:-1]
    is_python = all(base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__") for base in bases)
    return is_python and hasattr(value, "__dict__")


def _is_of_class(value: Any, name: Any) -> bool:
    return value is not _MISSING and type(value).__qualname__ == name
