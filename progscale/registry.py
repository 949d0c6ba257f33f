"""Names to things that users can add: model families, methods, schedules, optimizers, tasks.

`@register("name")` stands in the file that defines the thing; a package of somebody else's does the same
through an entry point of the registry's group, whose module is imported when names are first looked up.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from progscale.errors import ConfigError, RegistryError, nearest

T = TypeVar("T")

_BY_GROUP: dict[str, Registry[Any]] = {}


def registered(group: str) -> list[str]:
    """Names in the registry of an entry-point group so far; nothing is imported to find more."""
    return list(_BY_GROUP[group]._entries) if group in _BY_GROUP else []


class Registry(Generic[T]):
    """A named collection that is filled by decorators and by entry points.

    Args:
        kind: what it holds, for messages ("model family").
        group: the entry-point group that other packages use ("progscale.families").
        package: a package of ours whose modules register the built-in entries; imported on first use.
    """

    def __init__(self, kind: str, group: str, package: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False
        self._loading = False
        _BY_GROUP.setdefault(group, self)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: adds the thing under `name`.

        Raises:
            RegistryError: the name is taken by another thing.
        """

        def add(thing: T) -> T:
            self.add(name, thing)
            return thing

        return add

    def add(self, name: str, thing: T) -> None:
        """Adds `thing` under `name`; raises RegistryError when the name is taken by another thing."""
        if name in self._entries and self._entries[name] is not thing:
            raise RegistryError(f"{self.kind} '{name}' is registered twice; registered: {', '.join(self._entries)}")
        self._entries[name] = thing

    def remove(self, name: str) -> None:
        """Takes an entry out again (for tests and notebooks that define a thing anew)."""
        del self._entries[name]

    def get(self, name: str) -> T:
        """The thing registered under `name`.

        Raises:
            RegistryError: no such name; the message lists those that exist.
        """
        self._load()
        if name not in self._entries:
            raise RegistryError(
                f"no {self.kind} '{name}'; registered: {', '.join(sorted(self._entries))}{nearest(name, self._entries)}"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, thing) in the order of registration."""
        self._load()
        return iter(list(self._entries.items()))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def _load(self) -> None:
        if self._loaded or self._loading:
            return
        self._loading = True
        try:
            self._import_all()
            self._loaded = True  # only now: after a failed import the next look-up fails too, and says why
        finally:
            self._loading = False

    def _import_all(self) -> None:
        if self._package:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self.group):
            thing = point.load()
            # An entry point may name the module that registers, or the thing itself.
            if thing not in self._entries.values() and not isinstance(thing, type(importlib)):
                self.add(point.name, thing)


def import_plugin(module: str) -> None:
    """Imports a user's module by name, from the working directory too."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--plugin {module}: no name of a module; give it as in an import, e.g. --plugin my_encoder")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise ConfigError(f"--plugin {module}: no such module in the working directory or the environment") from error
        raise
