"""The usual mistakes of a newcomer: calls of a plain training loop that a distributed one replaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from lightwork.errors import SpecError, UsageError
from lightwork.notice import notice


def refused_hook(kind: str, name: str = "") -> str:
    """Say why a hook on an optimizer's step can not be, and what replaces it."""
    instead = {
        "pre": "To clip the gradient, pass clip_grad_norm= to distribute; change settings such as learning rates "
        "before the loop over the micro-batches of a step.",
        "post": "Do it after the loop over the micro-batches of a step, when the update is done; weights are written "
        "in run.edit().",
    }
    return (
        f"optimizer.register_step_{kind}_hook was called{f' with {name}' if name else ''}. The team takes the "
        f"optimizer's step piece by piece, so nothing calls the hook, and no worker has the whole gradient. Leave it "
        f"out. {instead[kind]}"
    )


_REPLACED = {
    "step": "optimizer.step() was called on a distributed run. Leave it out: the update happens when the loop over the "
    "micro-batches of a step ends.",
    "zero_grad": "optimizer.zero_grad() was called on a distributed run. Leave it out: gradients never outlive a step.",
    "register_step_pre_hook": refused_hook("pre"),
    "register_step_post_hook": refused_hook("post"),
}


def say_written(parameter: str | None, *, is_error: bool) -> None:
    """Say that a script has written a weight, if there is one, after the last step, while all workers shared it.

    Raises: UsageError, if it is an error; at the end of a script it is a notice.
    """
    if parameter is None:
        return
    message = (
        f"parameter {parameter} was written after the last step and before run.close(). Until then all workers share "
        "their weights, so that each of them has written the same memory. Call run.close() first, or write in "
        "`with run.edit():`."
    )
    if is_error:
        raise UsageError(message)
    notice(message)


def refuse_parameters_of_others(model: nn.Module, others: Iterable[object]) -> None:
    """Raise UsageError when a parameter of the model belongs to a model of another run, which is not closed."""
    taken = {parameter for other in others if isinstance(other, nn.Module) for parameter in other.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in taken:
            raise UsageError(
                f"parameter {name} is a parameter of another run's model, too, and would be moved away from it. Call "
                "run.close() on that run first; or give each model its own; or, if it is frozen, keep the module that "
                "has it out of both models."
            )


class Guard:
    """Puts explanations in place of an optimizer's methods that can not be called, until `close`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._num_parameters = _count_parameters(optimizer)
        self._before = {name: optimizer.__dict__[name] for name in _REPLACED if name in optimizer.__dict__}
        for name, message in _REPLACED.items():
            optimizer.__dict__[name] = _refusal(message)

    def check_parameters(self) -> None:
        """Raise SpecError when the optimizer got parameters after `distribute`."""
        count = _count_parameters(self._optimizer)
        if count != self._num_parameters:
            raise SpecError(
                f"the optimizer has {count} parameters, {count - self._num_parameters:+d} since distribute. Parameters "
                "can not be added or removed during a run: add them before distribute, and freeze with "
                "requires_grad_(False)."
            )

    def updated(self) -> None:
        """Tell schedulers, which warn when they step before the optimizer, that an update happened."""
        self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give the optimizer its methods back."""
        for name in _REPLACED:
            self._optimizer.__dict__.pop(name, None)
        self._optimizer.__dict__.update(self._before)


def _count_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _refusal(message: str) -> Any:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise UsageError(message)

    refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # what torch's schedulers look for
    return refuse
