"""The usual mistakes of a newcomer: calls of a plain training loop that a distributed one replaces."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from lightwork.errors import UsageError

_REPLACED = {
    "step": "optimizer.step() was called on a distributed run. Leave it out: the update happens when the loop over the "
    "micro-batches of a step ends.",
    "zero_grad": "optimizer.zero_grad() was called on a distributed run. Leave it out: gradients never outlive a step.",
}


class Guard:
    """Puts an explanation in place of the optimizer's `step` and `zero_grad`, until `close`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before = {name: optimizer.__dict__[name] for name in _REPLACED if name in optimizer.__dict__}
        for name, message in _REPLACED.items():
            optimizer.__dict__[name] = _refusal(message)

    def updated(self) -> None:
        """Tell schedulers, which warn when they step before the optimizer, that an update happened."""
        self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give the optimizer its methods back."""
        for name in _REPLACED:
            self._optimizer.__dict__.pop(name, None)
        self._optimizer.__dict__.update(self._before)


def _refusal(message: str) -> Any:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise UsageError(message)

    refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # what torch's schedulers look for
    return refuse
