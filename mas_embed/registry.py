"""Components by name: the one shape of table that data sets, models, losses, methods, evaluators and all others share.

A component is a class or function that is registered under a name, with its options as keyword arguments. Packages other than
this one add theirs through the entry-point group `mas_embed.components`: each entry point names a module that registers
components when it is imported.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from mas_embed.errors import UserError, unknown_name

ENTRY_POINT_GROUP = "mas_embed.components"

Constructor = Callable[..., Any]
Component = TypeVar("Component", bound=Constructor)


class MadeByName(NamedTuple):
    """How a component was made.

    Attributes:
        name: in its registry.
        options: with which it was made.
    """

    name: str
    options: dict[str, Any]


# Beside the objects, to which nothing is attached; an entry ends with its object
_MADE: WeakKeyDictionary[Any, MadeByName] = WeakKeyDictionary()


def remember_made(component: Any, name: str, options: Mapping[str, Any]) -> None:
    """Notes the name and the options with which an object was made, for `made_by_name`."""
    with suppress(TypeError):  # of what cannot be referenced weakly, nothing is noted
        _MADE[component] = MadeByName(name, dict(options))


def made_by_name(component: Any) -> MadeByName | None:
    """The name and the options with which an object of this process was made; None if it was made otherwise."""
    try:
        return _MADE.get(component)
    except TypeError:  # neither hashable nor weakly referenced
        return None


class Registry(Mapping[str, Constructor]):
    """Maps the name of a component, as a config gives it, to the class or function that makes it.

    Args:
        kind: the kind of component, for messages: "method", "model", "data set".
        library: returns further components of a library by name, such as the losses of pytorch-metric-learning; called when
            first needed, so that the library is not imported before.
        remembers: whether it is noted, for `made_by_name`, with which options a registered function has made an object.

    Examples:
        >>> METHODS = Registry("method")
        >>> @METHODS.register("nothing")
        ... class Nothing: ...
        >>> METHODS["nothing"] is Nothing
        True
    """

    def __init__(
        self, kind: str, *, library: Callable[[], Mapping[str, Constructor]] = dict, remembers: bool = False
    ) -> None:
        self.kind, self.remembers = kind, remembers
        self._components: dict[str, Constructor] = {}
        self._provides: dict[str, frozenset[str]] = {}
        self._library = cache(library)

    def register(self, name: str, *, provides: Iterable[str] = ()) -> Callable[[Component], Component]:
        """A decorator that registers a class or function under a name.

        Args:
            name: as a config gives it; a name is taken once.
            provides: of a data set, the names that its `SplitSequence.provides` holds. An option of that name, of any other
                component in a config, is then filled in.

        Raises:
            UserError: the name is no text.
            ValueError: the name is taken.
        """
        if not isinstance(name, str) or not name or isinstance(provides, str):
            raise UserError(
                f"a {self.kind} is registered under a name, as in register('mine', provides=['more']), got the name "
                f"{reprlib.repr(name)} and provides={reprlib.repr(provides)}"
            )

        def decorate(component: Component) -> Component:
            if name in self._components:
                raise ValueError(
                    f"{self.kind} '{name}' is registered already, as {self._components[name].__qualname__}"
                )
            if self.remembers and inspect.isfunction(component):
                component = _remembering(component, name)
            self._components[name] = component
            self._provides[name] = frozenset(provides)
            return component

        return decorate

    def provided_by(self, name: str) -> frozenset[str]:
        """The names that a component provides to others, see `register`."""
        return self._provides.get(name, frozenset())

    def added(self) -> dict[str, Constructor]:
        """The components by name that neither this package nor the library has brought."""
        package = __name__.partition(".")[0]
        return {name: one for name, one in self._components.items() if one.__module__.partition(".")[0] != package}

    def __getitem__(self, name: str) -> Constructor:
        components = self._all()
        if not isinstance(name, str) or name not in components:
            raise unknown_name(self.kind, name, components)
        return components[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Constructor]:
        load_entry_points()
        return {**self._library(), **self._components}


def _remembering(function: Component, name: str) -> Component:
    """The function, which notes the options of what it makes, defaults included."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        arguments = inspect.signature(function).bind(*args, **kwargs)
        arguments.apply_defaults()
        remember_made(made, name, arguments.arguments)
        return made

    return make  # type: ignore[return-value]


@cache
def load_entry_points() -> None:
    """Imports, once, every module that an installed package names in the entry-point group `mas_embed.components`.

    Warns:
        UserWarning: a module cannot be imported; its components are then missing.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            package = entry_point.dist.name if entry_point.dist else "an installed package"
            warnings.warn(
                f"the components '{entry_point.value}' of {package} are missing, because importing them fails: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
