"""What a run keeps for its script: objects with a state dict, such as schedulers, and plain values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightwork.checkpoint.values import take_apart
from lightwork.errors import CheckpointError, UsageError


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state `keep` can save and restore: a scheduler, an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state that `state_dict` returned."""


class Kept:
    """Objects and values by name, and what is saved of those that the script of a resumed run has not named yet."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    @property
    def values(self) -> Mapping[str, Any]:
        """Objects and values by name; of what was saved and is not named yet, what was saved."""
        return {**self._saved, **self._objects}

    def put(self, objects: Mapping[str, Any], *, restores: bool) -> None:
        """Take objects and values. With `restores`, those that were saved get what was saved.

        Raises: UsageError for what can not be saved.
        """
        for name, value in objects.items():
            if isinstance(value, Stateful) and not isinstance(value, type):
                if name in self._saved:
                    value.load_state_dict(self._saved[name])
            else:
                _check(name, value)
                if name in self._saved and restores:
                    value = self._saved[name]
            self._objects[name] = value
            self._saved.pop(name, None)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take what was saved with a run that goes on; objects that are here already take theirs."""
        self._saved = dict(saved)
        self.put(dict(self._objects), restores=True)

    def state(self) -> dict[str, Any]:
        """Return what is to be saved."""
        return {
            name: value.state_dict() if isinstance(value, Stateful) else value for name, value in self.values.items()
        }

    def copied(self) -> dict[str, Any]:
        """Return it as it is now, whatever becomes of the objects."""
        return copy.deepcopy(self.state())


def _check(name: str, value: object) -> None:
    try:
        take_apart(value, {}, name)
    except CheckpointError as error:
        raise UsageError(
            f"run.keep({name}=...): {error} Or objects that have state_dict() and load_state_dict()."
        ) from error
