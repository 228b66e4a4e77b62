"""Warnings about protected parameters that a model no longer has, that were replaced, or that are no longer trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

_MOST_NAMES = 3  # that a warning lists
_REMEDY = "call consolidate() with data of the earlier splits to protect the parameters that are trained now"


class ParameterWatch:
    """Notices when the parameters that a method protects are no longer those that it stored values for.

    Every state of the model gives at most one warning:

    - Parameters vanished: the model has no parameter of that name. The others are still pulled.
    - Parameters were replaced by new objects with the same name and shape. They are pulled as before. A new object on another
      device or of another dtype than the stored value is a conversion, of which there is no warning.
    - All are frozen, while other parameters of the model are trained. If only some are frozen, there is no warning, because
      they keep their values and the others are pulled.
    """

    def __init__(self) -> None:
        self._model_id: int | None = None
        self._stored: dict[str, int] = {}  # the identity of every protected parameter when its value was stored
        self._last: dict[str, int] = {}
        self._given: set[str] = set()

    def start(self, model: nn.Module, names: Iterable[str]) -> None:
        """Called when values of the parameters with these names were stored."""
        parameters = dict(model.named_parameters())
        self._model_id = id(model)
        self._stored = self._last = {name: id(parameters[name]) for name in names if name in parameters}

    def check(
        self, method: str, model: nn.Module, anchor: Mapping[str, Tensor], trainable: Mapping[str, nn.Parameter]
    ) -> None:
        """Warns if protected parameters have changed since the last call; else it compares identities only.

        Args:
            method: the name of the method for the warning.
            model: the model that is trained.
            anchor: the stored values by parameter name.
            trainable: the trainable parameters of the model by name.
        """
        present = {name: id(trainable[name]) for name in anchor if name in trainable}
        if present == self._last:
            return
        if self._model_id != id(model):  # the method was given another model, such as a copy
            self.start(model, anchor)
        self._last = present
        message = _message(method, model, anchor, trainable, self._stored)
        if message is not None and message not in self._given:
            self._given.add(message)
            warnings.warn(message, stacklevel=4)


def _message(
    method: str,
    model: nn.Module,
    anchor: Mapping[str, Tensor],
    trainable: Mapping[str, nn.Parameter],
    stored: Mapping[str, int],
) -> str | None:
    """The warning about the state of the protected parameters; None if the penalty is what `consolidate` announced."""
    names = dict(model.named_parameters()).keys()
    vanished = [name for name in anchor if name not in names]
    if vanished:
        return (
            f"{method} protects {_listed(vanished)}, which the model no longer has, as after an adapter was merged, so nothing "
            f"pulls what replaced them; {_REMEDY}"
        )
    replaced = [
        name for name in anchor if name in trainable and _is_replaced(trainable[name], anchor[name], stored.get(name))
    ]
    if replaced:
        return (
            f"{method} pulls {_listed(replaced)} to the values of other parameters that had the same names when they were "
            f"stored; if the new ones are not their continuation, as with a new adapter, make the method anew"
        )
    if anchor and trainable and not any(name in trainable for name in anchor):
        return (
            f"{method} pulls nothing, because {_listed(list(anchor))} are frozen while other parameters are trained, as with "
            f"another adapter active; train the protected parameters again, or {_REMEDY}"
        )
    return None


def _is_replaced(parameter: nn.Parameter, anchor: Tensor, stored: int | None) -> bool:
    if stored is None or id(parameter) == stored:
        return False
    return (parameter.shape, parameter.device, parameter.dtype) == (anchor.shape, anchor.device, anchor.dtype)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more parameters" if len(names) > _MOST_NAMES else ""
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMES]) + more
