"""Classes that can be built by name: defenses, attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from qcbguard_plugins.errors import UsageError

T = TypeVar("T")
_C = TypeVar("_C", bound=type[Any])


class Registry(Generic[T]):
    """Dataclasses by name.

    Args:
        kind: What an entry is called in messages, as in "unknown attack".
        parameter: What a field of an entry is called there.
    """

    def __init__(self, kind: str, parameter: str) -> None:
        self._kind, self._parameter = kind, parameter
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str, summary: str) -> Callable[[_C], _C]:
        """A decorator that gives a class a name and a summary; a name can be taken once."""

        def register(cls: _C) -> _C:
            if name in self._entries:
                raise ValueError(f"{self._kind} {name!r} is registered already, by {self._entries[name].__name__}")
            cls.name, cls.summary = name, summary
            self._entries[name] = cls
            return cls

        return register

    def available(self) -> dict[str, type[T]]:
        """All entries by name."""
        return dict(self._entries)

    def build(self, name: str, **parameters: Any) -> T:
        """Build an entry.

        Raises:
            UsageError: The name or a parameter is unknown, or a value is out of range.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise UsageError(f"unknown {self._kind} {name!r}", remedy=f"Known: {known}.")
        cls: Any = self._entries[name]
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(parameters) - fields)
        if unknown:
            raise UsageError(
                f"{self._kind} {name!r} has no {self._parameter} {', '.join(unknown)}",
                remedy=f"Its {self._parameter}s: {', '.join(sorted(fields)) or 'none'}.",
            )
        built: T = cls(**parameters)
        return built
