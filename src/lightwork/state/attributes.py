"""What modules keep in attributes, outside of buffers, and a forward leaves for the next one.

A worker's forwards are those of the micro-batches that fall to it, so that such a number or tensor depends on the team,
and so does what is computed with it. Many modules note something that no forward reads: this is said, and not refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from lightwork.notice import notice

_Place = tuple[str, str]


@final
class Attributes:
    """The numbers and tensors of one worker's model, looked at around its first forwards."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, vars(module)) for name, module in model.named_modules()]
        self._then: Mapping[_Place, Any] = {}
        self._changes: Counter[_Place] = Counter()

    def before_forward(self) -> None:
        """Remember them as they are: what the script sets between two steps it sets on every worker."""
        self._then = self._now()

    def after_forward(self) -> None:
        """Say which one a forward has changed, once and when it is the second to do so: the first may find a size."""
        now = self._now()
        for place, then in self._then.items():
            if place in now and (now[place] is not then if _has_tensors(then) else now[place] != then):
                self._changes[place] += 1
                if self._changes[place] == 2:
                    self._tell(place, then, now[place])

    def _tell(self, place: _Place, then: Any, now: Any) -> None:
        module, key = place
        owner = f"module {module}" if module else "the model"
        if _has_tensors(then):
            notice(
                f"{owner} keeps {key} in an attribute, and each forward puts another tensor there. If a forward reads "
                "what the one before it has left, it depends on the team: a worker's forwards are those of its own "
                "micro-batches. Carry it in the data, or in a buffer with a rule (distribute(..., buffers=...))."
            )
        else:
            notice(
                f"{owner} keeps the number {key} in an attribute, and each forward changes it (from {then} to {now}). "
                "A worker's forwards are those of its own micro-batches, and a resumed run begins anew: what is "
                f"computed with it depends on the team. As a buffer, register_buffer({key!r}, torch.tensor({then})), "
                "it is the same for all."
            )

    def _now(self) -> dict[_Place, Any]:
        return {
            (name, key): value
            for name, attributes in self._modules
            for key, value in attributes.items()
            if type(value) in (int, float) or _has_tensors(value)
        }


def _has_tensors(value: Any) -> bool:
    """Return whether it is a tensor without a graph, which another forward could read, or a tuple or list of such."""
    if isinstance(value, tuple | list):
        return bool(value) and all(_has_tensors(item) for item in value)
    return isinstance(value, torch.Tensor) and not value.requires_grad
