"""The user's model as it was taken over: which parameters, buffers and modules it has, and under which names.

A run keeps hold of these objects. One that appears, goes or is replaced later would not be trained, or not be saved,
without a word; so they are looked at again, by identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from lightwork.errors import UsageError
from lightwork.state.attributes import Attributes


class _Held(NamedTuple):
    """What a module holds of one kind."""

    module: str  #: its name
    kind: str  #: the attribute of nn.Module that holds them
    live: Mapping[str, Any]  #: the module's own dictionary
    then: dict[str, Any]  #: as it was taken over


class Structure:
    """What a model consists of."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes = Attributes(model)
        self.accept()

    def accept(self) -> None:
        """Take the model as it is now for legitimate."""
        self._held = [
            _Held(name, kind, live, dict(live))
            for kind in ("_parameters", "_modules", "_buffers")
            for name, module in self._model.named_modules()
            for live in (vars(module)[kind],)
        ]
        # Objects that are held keep their ids to themselves.
        self._filled = [held.live for held in self._held if held.then]
        self._ids = _ids(self._filled)
        self._size = sum(len(held.then) for held in self._held)

    def check(self, when: str, *, whole: bool = False) -> None:
        """Raise UsageError when something was added, removed or replaced; of modules that had nothing, with `whole`."""
        if _ids(self._filled) != self._ids or (whole and sum(len(held.live) for held in self._held) != self._size):
            raise UsageError(self._difference(when) or f"the model was changed {when}. {_ADVICE['_modules']}")

    def before_forward(self) -> None:
        """Note what `check_forward` compares with."""
        self._attributes.before_forward()

    def check_forward(self, when: str) -> None:
        """Raise UsageError when a forward has added, removed or replaced something: more than a buffer's tensor.

        What it has left in other attributes is told.
        """
        self._attributes.after_forward()
        difference = self._difference(when, is_forward=True)
        if difference is not None:
            raise UsageError(difference)

    def _difference(self, when: str, *, is_forward: bool = False) -> str | None:
        for held in self._held:
            for key in dict.fromkeys((*held.then, *held.live)):
                now, then = held.live.get(key), held.then.get(key)
                if is_forward and held.kind == "_buffers" and now is not None and then is not None:
                    continue
                if now is not then or (key in held.live) != (key in held.then):
                    name = f"{held.module}.{key}" if held.module else key
                    return f"{_KINDS[held.kind]} {name} {_change(now, then)} {when}. {_ADVICE[held.kind]}"
        return None


_KINDS = {"_parameters": "parameter", "_modules": "module", "_buffers": "buffer"}

_ADVICE = {
    "_parameters": "The run trains the parameters that the model had at distribute: write into them, in "
    "`with run.edit(): parameter.copy_(...)`, or change the model first and call lightwork.distribute after it.",
    "_buffers": "The run keeps the buffers that the model had at distribute: give each a tensor of its final shape "
    "before it (run one batch through the model, say), and write into it: `with run.edit(): buffer.copy_(...)`.",
    "_modules": "The run trains the modules that the model had at distribute: change the model first, and call "
    "lightwork.distribute after it; then resume= or model.load_state_dict take over what was learnt.",
}


def _change(now: object, then: object) -> str:
    if then is None:
        return "appeared"
    return "was removed" if now is None else "was replaced by another object"


def _ids(dicts: list[Mapping[str, Any]]) -> list[int]:
    return list(map(id, chain.from_iterable(map(dict.values, dicts))))  # type: ignore[arg-type]
