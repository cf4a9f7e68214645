"""Hooks that a run puts on modules, and that copies of these modules are without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class ModuleHook:
    """A hook on a module. In a copy, by `copy.deepcopy` or pickle, it does nothing: the copy is none of the run's."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Do what it is for."""
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Stand for one that does nothing."""
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """Do nothing."""


class Outermost:
    """A context around the outermost of the forwards that run within one another.

    `before` and `after` are the hooks of each module that counts. `after` is to be called whatever happens.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        self._context = context
        self._depth = 0
        self._entered: AbstractContextManager[object] | None = None

    def before(self, *_: object) -> None:
        """Begin a forward."""
        self._depth += 1
        if self._depth == 1:
            self._entered = self._context()
            self._entered.__enter__()

    def after(self, *_: object) -> None:
        """End it, with an error or without."""
        self._depth -= 1
        if self._depth == 0 and self._entered is not None:
            entered, self._entered = self._entered, None
            entered.__exit__(None, None, None)
