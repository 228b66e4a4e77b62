"""Components by name: the one shape of registry that methods, models and data sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mas_embed.errors import unknown_name

Component = TypeVar("Component", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., Any]]):
    """Maps a config name to the class or function that builds the component.

    Args:
        kind: what is registered, for error messages: "method", "model", "data set".

    Example:
        >>> METHODS = Registry("method")
        >>> @METHODS.register("nothing")
        ... class Nothing: ...
        >>> METHODS["nothing"] is Nothing
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._components: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Component], Component]:
        """A decorator that registers a class or function under `name`; a name is taken once."""

        def decorate(component: Component) -> Component:
            if name in self._components:
                raise ValueError(
                    f"{self.kind} '{name}' is registered already, as {self._components[name].__qualname__}"
                )
            self._components[name] = component
            return component

        return decorate

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._components:
            raise unknown_name(self.kind, name, self._components)
        return self._components[name]

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)
