"""Hooks that a run puts on modules, and that copies of these modules are without."""

from __future__ import annotations

from collections.abc import Callable
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
